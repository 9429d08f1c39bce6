// The one form of product that the engine knows:
//
//   C[i][lane] (+)= sum_k A(i, k) * B[k][lane]        i < rows, lane < MV * W
//
// with A read one 32-bit operand at a time, B and C in rows of lanes. A "columns" operand has its k index strided
// (A + k * stride + i), a "rows" operand its i index (A + i * stride + k).
#pragma once

namespace {

enum class Walk { Rows, Columns };

// What happens to a finished sum.
enum class Into {
  Add,    // C += sum
  Set,    // C = sum
  Score,  // C = factor * sum + shift, and peak[lane] = max(peak[lane], C)
};

#if defined(__GNUC__)
#define BSA_INLINE inline __attribute__((always_inline))
#else
#define BSA_INLINE inline
#endif

}  // namespace
