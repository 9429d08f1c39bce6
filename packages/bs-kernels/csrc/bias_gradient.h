// Gradients of pairs, dS = P (dP - delta) in f32, and the sums of a tile of them over what attn_bias broadcasts over.
#pragma once
#include "softmax.h"

namespace {

// dscores -> dS, in place. With `drops`, dP of a pair is 0 or `factor` times what dscores holds, by the bits of Dropout::keep.
template <class V, int MV, bool drops>
__attribute__((noinline)) void pair_gradients(const float* scores, float* dscores, long rows, const float* lse, const float* delta,
                                              const uint32_t* keep, float factor) {
  for (int j = 0; j < MV; ++j) {
    const typename V::f of_lse = V::load(lse + j * V::W), of_delta = V::load(delta + j * V::W), scale = V::all(factor);
    for (long n = 0; n < rows; ++n) {
      const long x = (n * MV + j) * V::W;
      typename V::f d = V::load(dscores + x);
      if (drops) d = V::keep_bits(V::mul(d, scale), keep[n * MV + j]);
      V::store(dscores + x, V::mul(exp<V>(V::sub(V::load(scores + x), of_lse)), V::sub(d, of_delta)));
    }
  }
}

// to[lane * query_stride + n * key_stride] += tile[n][lane] for `rows` keys and `count` lanes. Reads whole W x W squares of the tile.
template <class V>
__attribute__((noinline)) void add_pairs(const float* tile, long lanes, long rows, long count, float* to, long query_stride,
                                         long key_stride) {
  alignas(64) float square[V::W * V::W];
  for (long n = 0; n < rows; n += V::W)
    for (long l = 0; l < count; l += V::W) {
      V::transpose(tile + n * lanes + l, lanes, square, V::W);
      for (long x = 0; x < V::W && l + x < count; ++x) {
        float* p = to + (l + x) * query_stride + n * key_stride;
        if (key_stride == 1 && n + V::W <= rows)
          V::store(p, V::add(V::load(p), V::load(square + x * V::W)));
        else
          for (long y = 0; y < V::W && n + y < rows; ++y) p[y * key_stride] += square[x * V::W + y];
      }
    }
}

// Sum of the lanes of a vector, halves first.
template <class V>
BSA_INLINE float sum_lanes(typename V::f x) {
  float lane[V::W];
  V::store(lane, x);
  for (int half = V::W / 2; half; half /= 2)
    for (int l = 0; l < half; ++l) lane[l] += lane[l + half];
  return lane[0];
}

// Sum over the queries of key row n of a tile.
template <class V, int MV>
BSA_INLINE float sum_queries(const float* row) {
  typename V::f sum = V::load(row);
  for (int j = 1; j < MV; ++j) sum = V::add(sum, V::load(row + j * V::W));
  return sum_lanes<V>(sum);
}

// to[lane * stride] += the sum of the lane's keys.
template <class V, int MV>
BSA_INLINE void add_keys(const float* tile, long rows, long count, float* to, long stride) {
  for (int j = 0; j < MV; ++j) {
    typename V::f sum = V::all(0.f);
    for (long n = 0; n < rows; ++n) sum = V::add(sum, V::load(tile + (n * MV + j) * V::W));
    float lane[V::W];
    V::store(lane, sum);
    for (long l = 0; l < V::W && j * V::W + l < count; ++l) to[(j * V::W + l) * stride] += lane[l];
  }
}

}  // namespace
