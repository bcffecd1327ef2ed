// One layer, or several with the same input: the base's product and the deltas of all variants of the batch in one pass.
#pragma once

#include "batch.h"

namespace deltaserve {

// y = base(x) for the layers that have a weight, then += deltas and biases by the segment table, which may be empty.
// Throws std::bad_alloc before anything is written.
Error linear(const Operations& operations, const Layer* layers, int64_t count, const Matrix& y, const Matrix& x,
             const Segments& segments);

} // namespace deltaserve
