// The gradient of attn_bias: dS = P (dP - delta), summed over what the bias broadcasts over.
//
// A pass of its own beside those of backward.h, with two products per tile. A task owns what it writes: a row of blocks or, where
// queries broadcast, a column; it walks all batch elements and heads that share it in order, so that threads never change bits.
#pragma once
#include "dropout.h"
#include "problem.h"

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

template <class V>
class Backward;

template <class V>
class BiasGradient {
 public:
  explicit BiasGradient(const Backward<V>& kernel) : k_(kernel), c_(kernel.c_) {}

  long tasks() const { return c_.dattn_bias ? batches() * heads() * blocks() : 0; }
  long bytes() const { return tasks() * long(sizeof(double)); }
  void use(double* sums) { sums_ = sums; }

  // Everything that block `x % blocks()` of a plane of attn_bias receives.
  void task(long x, typename Backward<V>::Space& s) {
    const long block = x % blocks(), plane_h = x / blocks() % heads(), plane_b = x / blocks() / heads();
    float* to = c_.dattn_bias + plane_b * c_.dattn_bias_batch + plane_h * c_.dattn_bias_head;
    sums_[x] = 0;
    for (long b = plane_b; b < (c_.dattn_bias_batch ? plane_b + 1 : c_.batch); ++b)
      for (long h = plane_h; h < (c_.dattn_bias_head ? plane_h + 1 : c_.q_heads); ++h)
        by_columns() ? column(b, h, block, to, s, sums_[x]) : row(b, h, block, to, s, sums_[x]);
  }

  // After all tasks: a plane whose queries and keys both broadcast is one number, the sum over its blocks.
  void finish() const {
    if (!c_.dattn_bias || c_.dattn_bias_query || c_.dattn_bias_key) return;
    for (long plane = 0; plane < batches() * heads(); ++plane) {
      double sum = 0;
      for (long block = 0; block < blocks(); ++block) sum += sums_[plane * blocks() + block];
      c_.dattn_bias[plane / heads() * c_.dattn_bias_batch + plane % heads() * c_.dattn_bias_head] = float(sum);
    }
  }

 private:
  static constexpr long L = 2 * V::W;

  long batches() const { return c_.dattn_bias_batch ? c_.batch : 1; }
  long heads() const { return c_.dattn_bias_head ? c_.q_heads : 1; }
  bool by_columns() const { return c_.dattn_bias_key && !c_.dattn_bias_query; }
  long blocks() const { return by_columns() ? c_.kv_blocks : c_.q_blocks; }

  void row(long b, long h, long i, float* to, typename Backward<V>::Space& s, double& sum) const {
    const long r = k_.layout_.row(b, h, i);
    for (long q0 = c_.q_bounds[i]; q0 < c_.q_bounds[i + 1];) {
      int used = 0;
      for (; used < kTiles && q0 < c_.q_bounds[i + 1]; q0 += L) {
        const long left = c_.q_bounds[i + 1] - q0;
        k_.load_tile(s.tiles[used++], b, h, i, q0, left < L ? left : L, s.scratch);
      }
      for (long x = c_.row_begin[r]; x < c_.row_end[r]; ++x)
        each_piece(c_, x, [&](const Keys& keys) {
          for (int t = 0; t < used; ++t) visit(s.tiles[t], keys, s, to, sum);
        });
    }
  }

  void column(long b, long h, long j, float* to, typename Backward<V>::Space& s, double& sum) const {
    const long column = k_.layout_.column(b, h, j);
    for (long y = c_.col_begin[column]; y < c_.col_end[column]; ++y) {
      const long i = c_.t_rows[y];
      for (long q0 = c_.q_bounds[i]; q0 < c_.q_bounds[i + 1]; q0 += L) {
        const long left = c_.q_bounds[i + 1] - q0;
        k_.load_tile(s.tiles[0], b, h, i, q0, left < L ? left : L, s.scratch);
        each_piece(c_, c_.t_slots[y], [&](const Keys& keys) { visit(s.tiles[0], keys, s, to, sum); });
      }
    }
  }

  void visit(const typename Backward<V>::Tile& t, const Keys& keys, typename Backward<V>::Space& s, float* to, double& sum) const {
    if (t.vectors == 2)
      visit<2>(t, keys, s, to, sum);
    else
      visit<1>(t, keys, s, to, sum);
  }

  template <int MV>
  void visit(const typename Backward<V>::Tile& t, Keys keys, typename Backward<V>::Space& s, float* to, double& sum) const {
    constexpr long lanes = MV * V::W;
    TileMask mask;
    if (!k_.template score<MV>(t, t.h / k_.layout_.group(), keys, mask, s)) return;
    const long rows = keys.count, stride_q = c_.dattn_bias_query, stride_k = c_.dattn_bias_key;
    if (k_.drop_.on) {
      uint32_t keep[kKeys * MV];
      k_.drop_.template keep<V, MV>(t.b, t.h, mask.query0, mask.key0, rows, keep);
      pair_gradients<V, MV, true>(s.scores, s.dscores, rows, t.lse, t.delta, keep, k_.drop_.scale);
    } else {
      pair_gradients<V, MV, false>(s.scores, s.dscores, rows, t.lse, t.delta, nullptr, 1.f);
    }
    to += t.token * stride_q + (c_.kv_bounds[keys.block] + keys.offset) * stride_k;
    if (stride_q && stride_k)
      add_pairs<V>(s.dscores, lanes, rows, t.count, to, stride_q, stride_k);
    else if (stride_q)
      add_keys<V, MV>(s.dscores, rows, t.count, to, stride_q);
    else
      for (long n = 0; n < rows; ++n) {
        const float of_key = sum_queries<V, MV>(s.dscores + n * lanes);
        if (stride_k)
          to[n * stride_k] += of_key;
        else
          sum += of_key;
      }
  }

  const Backward<V>& k_;
  const bsa_call& c_;
  double* sums_ = nullptr;  // of each task, where queries and keys broadcast
};

}  // namespace
