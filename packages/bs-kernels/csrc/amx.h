// Products on matrix tiles (AMX): tile.h's form with 16 x 16 sums per register.
//
// A vector type with TILES brings eight tile registers of 16 rows of 64 bytes: zero<T>, load<T>, store<T>, and dot<C, A, B>, which
// adds to C[i][lane] the 16 pairs A(i, k) B[k][lane]. Operands are padded for it:
//
//   rows operand      A(i, k) at a + i * stride + 4 k, its depth padded with zeros to whole tiles
//   columns operand   A(i, k) at a + k / 16 * stride + 64 i + 4 (k % 16), depth and rows padded with zeros to whole tiles
//   B                 its depth padded with zeros to whole tiles
//
// Sums of a tile run over the depth in order, whatever the blocking: it never changes bits. The last rows % 16 of a rows operand,
// which may end where its tensor ends, go through the vector code.
#pragma once
#include <cstdint>

#include "forms.h"

namespace {

// What ldtilecfg reads: eight full tiles.
struct alignas(64) TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};
static_assert(sizeof(TileConfig) == 64, "the processor reads 64 bytes");

// Holds a thread's tile configuration for the length of a parallel region; nothing for types without tiles.
template <class V>
class TileRegion {
 public:
  TileRegion() {
    if constexpr (V::TILES) V::configure();
  }
  ~TileRegion() {
    if constexpr (V::TILES) V::release();
  }
  TileRegion(const TileRegion&) = delete;
  TileRegion& operator=(const TileRegion&) = delete;
};

// M x N tiles of C in registers 0 ... 3; A passes through 4 and 5, B through 6 and 7. Steps in bytes.
template <class V, int M, int N, bool add>
BSA_INLINE void tile_block(long chunks, const char* a, long row_step, long chunk_step, const char* b, long b_row, char* c, long c_row) {
  if constexpr (add) {
    V::template load<0>(c, c_row);
    if constexpr (N == 2) V::template load<1>(c + 64, c_row);
    if constexpr (M == 2) V::template load<2>(c + 16 * c_row, c_row);
    if constexpr (M == 2 && N == 2) V::template load<3>(c + 16 * c_row + 64, c_row);
  } else {
    V::template zero<0>();
    if constexpr (N == 2) V::template zero<1>();
    if constexpr (M == 2) V::template zero<2>();
    if constexpr (M == 2 && N == 2) V::template zero<3>();
  }
  for (; chunks > 0; --chunks, a += chunk_step, b += 16 * b_row) {
    V::template load<6>(b, b_row);
    V::template load<4>(a, row_step);
    V::template dot<0, 4, 6>();
    if constexpr (N == 2) {
      V::template load<7>(b + 64, b_row);
      V::template dot<1, 4, 7>();
    }
    if constexpr (M == 2) {
      V::template load<5>(a + 16 * row_step, row_step);
      V::template dot<2, 5, 6>();
      if constexpr (N == 2) V::template dot<3, 5, 7>();
    }
  }
  V::template store<0>(c, c_row);
  if constexpr (N == 2) V::template store<1>(c + 64, c_row);
  if constexpr (M == 2) V::template store<2>(c + 16 * c_row, c_row);
  if constexpr (M == 2 && N == 2) V::template store<3>(c + 16 * c_row + 64, c_row);
}

// C = factor * C + shift over `rows` rows that are still in the first cache, and the lane maxima.
template <class V, int MV>
BSA_INLINE void finish_scores(long rows, float* c, long ldc, float factor, float shift, float* peak) {
  const typename V::f scale = V::all(factor), add = V::all(shift);
  typename V::f top[MV];
  for (int j = 0; j < MV; ++j) top[j] = V::load(peak + j * V::W);
  for (long i = 0; i < rows; ++i)
    for (int j = 0; j < MV; ++j) {
      const typename V::f s = V::fma(V::load(c + i * ldc + j * V::W), scale, add);
      top[j] = V::max(s, top[j]);
      V::store(c + i * ldc + j * V::W, s);
    }
  for (int j = 0; j < MV; ++j) V::store(peak + j * V::W, top[j]);
}

// The whole tiles of tile.h's `product`; returns how many rows are done.
template <class V, int MV, Walk walk, Into into>
__attribute__((noinline)) long tile_product(long rows, long depth, const char* a, long stride, const float* b, long ldb, float* c,
                                            long ldc, float factor, float shift, float* peak) {
  static_assert(V::W == 16 && V::PAIR == 2 && (MV == 1 || MV == 2), "a tile row is one vector of pairs");
  constexpr bool add = into == Into::Add;
  const long chunks = (depth + 15) / 16, whole = walk == Walk::Rows ? rows / 16 * 16 : (rows + 15) / 16 * 16;
  const long row_step = walk == Walk::Rows ? stride : 64, chunk_step = walk == Walk::Rows ? 64 : stride;
  const char* from = reinterpret_cast<const char*>(b);
  long i = 0;
  for (; i + 32 <= whole; i += 32) {
    float* to = c + i * ldc;
    tile_block<V, 2, MV, add>(chunks, a + i * row_step, row_step, chunk_step, from, ldb * 4, reinterpret_cast<char*>(to), ldc * 4);
    if constexpr (into == Into::Score) finish_scores<V, MV>(32, to, ldc, factor, shift, peak);
  }
  if (i < whole) {
    float* to = c + i * ldc;
    tile_block<V, 1, MV, add>(chunks, a + i * row_step, row_step, chunk_step, from, ldb * 4, reinterpret_cast<char*>(to), ldc * 4);
    if constexpr (into == Into::Score) finish_scores<V, MV>(16, to, ldc, factor, shift, peak);
  }
  return whole < rows ? whole : rows;
}

}  // namespace
