// Register-tiled products in the form of forms.h: an operand of A is spread over the lanes and multiplied by a vector of B. Per
// element of C the sum runs over k in ascending order whatever the tiling, so tilings never change bits; it starts from zero also
// where it is added to C, so that rounding grows with the number of products. Vector types with matrix tiles use these for what
// amx.h leaves.
#pragma once
#include <cstdint>

#include "amx.h"
#include "forms.h"

namespace {

// Rows of bf16 pairs may start at any even address.
BSA_INLINE float operand(const char* p) {
  float x;
  __builtin_memcpy(&x, p, 4);
  return x;
}

template <class V, int R, int MV, Walk walk, Into into>
__attribute__((noinline)) void register_tile(long depth, const char* a, long stride, const float* b, long ldb, float* c, long ldc, float factor, float shift,
                              float* peak) {
  typename V::f acc[R][MV];
#pragma GCC unroll 16
  for (int i = 0; i < R; ++i)
#pragma GCC unroll 4
    for (int j = 0; j < MV; ++j) acc[i][j] = V::all(0.f);

  if constexpr (walk == Walk::Columns) {
    for (long k = 0; k < depth; ++k) {
      typename V::f bk[MV];
#pragma GCC unroll 4
      for (int j = 0; j < MV; ++j) bk[j] = V::pin(V::load(b + j * V::W));
#pragma GCC unroll 16
      for (int i = 0; i < R; ++i) {
        const typename V::f x = V::spread(operand(a + 4 * i));
#pragma GCC unroll 4
        for (int j = 0; j < MV; ++j) acc[i][j] = V::dot(acc[i][j], x, bk[j]);
      }
      a += stride;
      b += ldb;
    }
  } else {
    // Three rows share a pointer: x86 addresses base, base + stride and base + 2 stride without more registers.
    const char* base[(R + 2) / 3];
#pragma GCC unroll 8
    for (int g = 0; g < (R + 2) / 3; ++g) {
      base[g] = a + 3 * g * stride;
      asm("" : "+r"(base[g]));
    }
    for (long k = 0; k < depth; ++k) {
      typename V::f bk[MV];
#pragma GCC unroll 4
      for (int j = 0; j < MV; ++j) bk[j] = V::pin(V::load(b + j * V::W));
#pragma GCC unroll 16
      for (int i = 0; i < R; ++i) {
        const typename V::f x = V::spread(operand(base[i / 3] + (i % 3) * stride));
#pragma GCC unroll 4
        for (int j = 0; j < MV; ++j) acc[i][j] = V::dot(acc[i][j], x, bk[j]);
      }
#pragma GCC unroll 8
      for (int g = 0; g < (R + 2) / 3; ++g) base[g] += 4;
      b += ldb;
    }
  }

  if constexpr (into == Into::Score) {
    const typename V::f scale = V::all(factor), add = V::all(shift);
    typename V::f top[MV];
#pragma GCC unroll 4
    for (int j = 0; j < MV; ++j) top[j] = V::load(peak + j * V::W);
#pragma GCC unroll 16
    for (int i = 0; i < R; ++i)
#pragma GCC unroll 4
      for (int j = 0; j < MV; ++j) {
        const typename V::f s = V::fma(acc[i][j], scale, add);
        top[j] = V::max(s, top[j]);
        V::store(c + i * ldc + j * V::W, s);
      }
#pragma GCC unroll 4
    for (int j = 0; j < MV; ++j) V::store(peak + j * V::W, top[j]);
  } else {
#pragma GCC unroll 16
    for (int i = 0; i < R; ++i)
#pragma GCC unroll 4
      for (int j = 0; j < MV; ++j) {
        float* to = c + i * ldc + j * V::W;
        V::store(to, into == Into::Add ? V::add(V::load(to), acc[i][j]) : acc[i][j]);
      }
  }
}

template <class V, int MV, Walk walk, Into into>
void product(long rows, long depth, const void* a_, long stride, const float* b, long ldb, float* c,
                                       long ldc, float factor = 1.f, float shift = 0.f, float* peak = nullptr) {
  const char* a = static_cast<const char*>(a_);
  const long step = walk == Walk::Rows ? stride : 4;  // bytes from one row of the tile to the next
  if constexpr (V::TILES) {
    const long done = tile_product<V, MV, walk, into>(rows, depth, a, stride, b, ldb, c, ldc, factor, shift, peak);
    if constexpr (walk == Walk::Columns) return;
    rows -= done, a += done * step, c += done * ldc;
  }
  constexpr int R = V::ROWS;
  for (; rows >= R; rows -= R, a += R * step, c += R * ldc)
    register_tile<V, R, MV, walk, into>(depth, a, stride, b, ldb, c, ldc, factor, shift, peak);
#define BSA_REST(N)                                                                             \
  if (N < R && (rows & N)) {                                                                    \
    register_tile<V, N, MV, walk, into>(depth, a, stride, b, ldb, c, ldc, factor, shift, peak);        \
    a += N * step;                                                                              \
    c += N * ldc;                                                                               \
  }
  BSA_REST(8)
  BSA_REST(4)
  BSA_REST(2)
  BSA_REST(1)
#undef BSA_REST
}

// The same with the number of lane vectors known only at run time.
template <class V, Walk walk, Into into>
BSA_INLINE void product_lanes(int vectors, long rows, long depth, const void* a, long stride, const float* b, long ldb, float* c,
                              long ldc, float factor = 1.f, float shift = 0.f, float* peak = nullptr) {
  for (; vectors >= 2; vectors -= 2, b += 2 * V::W, c += 2 * V::W, peak = peak ? peak + 2 * V::W : peak)
    product<V, 2, walk, into>(rows, depth, a, stride, b, ldb, c, ldc, factor, shift, peak);
  if (vectors) product<V, 1, walk, into>(rows, depth, a, stride, b, ldb, c, ldc, factor, shift, peak);
}

}  // namespace
