// What the kernels are handed: a delta as layout.py prepared it, a batch cut into tiles, and the table of operations that
// each instruction set fills. The structs up to Swap are mirrored field by field in structs.py.
#pragma once

#include <cstdint>

namespace deltaserve {

constexpr int PANEL = 64;     // output rows that one thread computes at a time; every block size divides it
constexpr int CHUNK = 16;     // values decoded at a time; every line of codes is padded to a multiple of it
constexpr int MAX_LANES = 16; // rows of the batch that vectors run over
constexpr int MAX_GROUP = 4;  // tiles with lanes, of one variant, that share what is decoded
constexpr int MAX_TILE_ROWS = 64; // rows of a tile with one lane
constexpr int MAX_PARTS = 8;

enum class Codec : int32_t { float32, bf16, int8, int4, int2, sign };
enum class Kind : int32_t { sparse, low_rank, dense, rows };
enum class Dtype : int32_t { float32, bf16, float16 };

// Lines of `length` values, each padded to `line_bytes`. Scales (bfloat16) cover `group` >= CHUNK consecutive values of
// the unpadded lines, one after the other; nullptr for the float codecs.
struct Codes {
    const uint8_t* data;
    const uint16_t* scales;
    int64_t length;
    int64_t line_bytes;
    int64_t group;
    Codec codec;
    int32_t unused;
};

// One summand. `a` holds the values of a sparse part (a line is one block, [K, V]), of a dense part and of whole rows
// (a line is one row), and the first factor of a low-rank part; `b` holds its second factor column after column (a line is
// one column, [out], its scales are one for `group` rows: 1, or a multiple of CHUNK).
struct Part {
    Kind kind;
    int32_t block;         // sparse: V
    int32_t wide_columns;  // sparse: columns are 32 bits wide, not 16
    float gain;            // sparse: the factor of every column where `factors` is nullptr, else 1
    int64_t kept;          // sparse: K; low-rank: r; rows: how many are stored
    const void* columns;   // sparse: [blocks, K], and CHUNK more entries that may be read but count for nothing
    const float* factors;  // sparse: [in]
    Codes a;
    Codes b;
    const int64_t* ids;    // rows: ascending
    const float* mean;     // rows: [in] or nullptr
    int64_t mean_rows;
};

struct Delta {
    int64_t rows;  // out
    int64_t width; // in
    const Part* parts;
    int64_t count;
    double cycles; // about what one row of the batch costs, to decide whether threads are worth waking
};

// One linear layer: the base's own weight and what each slot adds to it.
struct Layer {
    const void* weight;         // [rows, width], row after row; nullptr where y already holds the base's product
    const float* scales;        // int8: [rows]
    const float* bias;          // [rows] or nullptr; int8: divided by the scales
    const Delta* const* deltas; // [slots], nullptr where a variant leaves the weight as it is
    const float* const* biases; // [slots] of float32 [rows], nullptr likewise; or nullptr where no slot has one
    int64_t slots;
    int64_t rows; // out
    int64_t width; // in
    Codec codec;  // float32, bf16 or int8
    int32_t unused;
};

struct Matrix {
    void* data;
    int64_t stride; // values from one row to the next; a row is contiguous
    int64_t rows;
    int64_t width;
    Dtype dtype;
    int32_t unused;
};

// One weight that a delta of one sparse part goes into, or comes out of; `saved` [rows, K] holds what stands there without it.
struct Swap {
    Matrix weight;
    const Delta* delta;
    void* saved;
};

// Rows of the batch that belong to one variant. With one lane up to MAX_TILE_ROWS of them, read where they lie: row t of the
// tile is x + rows[t] * stride. With more lanes up to MAX_LANES of them packed, x [in][lanes], lanes beyond `count` zero: for
// blocks that are narrower than a vector, so that vectors run over the batch. `inputs` holds what each part multiplies: x,
// packed x times the factors (sparse), [r][lanes] or [count][r] products with the first factor (low-rank), or the products
// with the mean row (rows).
struct Tile {
    const Delta* delta;
    const int32_t* rows;
    int32_t count;
    int32_t lanes;
    float* x;
    int64_t stride;
    float* inputs[MAX_PARTS];
};

struct Attention;
struct Pages;

struct Operations {
    const char* name;
    int32_t lanes; // widest tile that this instruction set's registers hold
    // to[columns from .. end][lanes] = the tile's rows of x in float32, times `factors` unless nullptr
    void (*pack)(const Tile&, const Matrix& x, const float* factors, int64_t from, int64_t end, float* to);
    // line i of `lines` of `tile.inputs[part]`
    void (*project)(const Tile&, int64_t part, int64_t line, int64_t lines, float* scratch);
    // how many rows of x a call of `product` may have: their part of the L2 cache
    int64_t (*pass_rows)(int64_t width);
    // y[all rows, from .. to] = x @ weight[from .. to].T + bias, x [y.rows, width] in float32
    void (*product)(const Layer&, const float* x, int64_t x_stride, const Matrix& y, int64_t from, int64_t to);
    // y[the tile's rows, from .. to] += delta, for a tile with one lane
    void (*add_by_rows)(const Tile&, int64_t from, int64_t to, const Matrix& y, float* scratch);
    // the same for up to MAX_GROUP tiles with lanes, of one variant
    void (*add_by_lanes)(const Tile* tiles, int64_t count, int64_t from, int64_t to, const Matrix& y, float* scratch);
    // y[row, from .. to] += addend[from .. to]
    void (*add)(const Matrix& y, int64_t row, int64_t from, int64_t to, const float* addend);
    // y [width] = (weight + offset) * x / root(mean(x * x) + epsilon)
    void (*rms_norm)(const float* x, const float* weight, int64_t width, float epsilon, float offset, float* y);
    // to [width] = row of x in float32
    void (*widen)(const Matrix& x, int64_t row, float* to);
    // y[row] += delta[id]
    void (*embed)(const Delta&, int64_t id, const Matrix& y, int64_t row, float* scratch);
    // weight[rows of block] += sparse; what stood there goes to saved [rows, K]
    void (*swap_in)(const Matrix& weight, const Part&, int64_t block, void* saved, float* scratch);
    void (*swap_out)(const Matrix& weight, const Part&, int64_t block, const void* saved);
    // attention (attend.h): a row's query over some keys; shares put together, one after the other; the row's result
    void (*attend)(const Attention&, const Pages&, int64_t row, int64_t from, const float* query, float* partial, float* scratch);
    void (*merge)(const Attention&, float* partial, float* total);
    void (*finish)(const Attention&, float* total, float* out);
    void (*rotate)(const float* cosines, const float* sines, int64_t heads, int64_t width, float* x);
    // gate [n] = silu(gate) * up
    void (*gate_by_silu)(const float* up, int64_t n, float* gate);
};

extern const Operations operations_portable;
extern const Operations operations_avx2;
extern const Operations operations_avx512;

} // namespace deltaserve
