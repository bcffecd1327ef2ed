// The C interface of the CPU kernels; Python reaches it through ctypes (library.py).

#if defined(_WIN32)
#define DELTASERVE_API extern "C" __declspec(dllexport)
#else
#define DELTASERVE_API extern "C" __attribute__((visibility("default")))
#endif

// Raised whenever a signature below changes; library.py refuses to load a library of another version.
DELTASERVE_API int deltaserve_abi_version() { return 1; }
