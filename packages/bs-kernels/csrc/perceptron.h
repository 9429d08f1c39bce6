// Layer norm, then linear layers with GELU between them; every head has weights of its own.
#pragma once
#include <cmath>

#include "problem.h"

namespace {

template <class V>
class Perceptron {
 public:
  explicit Perceptron(const bsa_perceptron& c) : c_(c) {}

  int run() const {
    if (c_.layers < 1 || c_.layers > BSA_MAX_LAYERS) return BSA_BAD_ARGUMENT;
    for (int i = 1; i <= c_.layers; ++i)
      if (c_.widths[i] < 1 || c_.widths[i] % BSA_LANES) return BSA_BAD_ARGUMENT;
    const long pieces = (c_.rows + kRows - 1) / kRows, items = c_.batch * c_.heads * pieces;
    Counter work;
    run_team(c_.num_threads, [&](int thread) {
      float* const scratch = c_.scratch + thread * 2 * kRows * c_.widest;
      for (long x; (x = work.take()) < items;) {
        const long of = x / pieces, from = x % pieces * kRows;
        piece(of, of % c_.heads, from, std::min(kRows, c_.rows - from), scratch);
      }
    });
    return BSA_OK;
  }

 private:
  static constexpr long kRows = BSA_PERCEPTRON_ROWS;

  // `count` rows of one head, layer by layer.
  void piece(long of, long head, long from, long count, float* scratch) const {
    float *in = scratch, *out = scratch + kRows * c_.widest;
    long width = c_.widths[0];
    for (long r = 0; r < count; ++r) normalise(c_.x + (of * c_.rows + from + r) * width, width, in + r * width);
    for (int i = 0; i < c_.layers; ++i) {
      const long next = c_.widths[i + 1];
      const bool last = i + 1 == c_.layers;
      if (last) out = c_.out + (of * c_.rows + from) * next;
      product_lanes<V, Walk::Rows, Into::Set>(int(next / V::W), count, width, in, width * 4, c_.weights[i] + head * width * next, next, out, next);
      const float* const bias = c_.biases[i] + head * next;
      for (long r = 0; r < count; ++r)
        for (long n = 0; n < next; n += V::W) {
          float* const at = out + r * next + n;
          const typename V::f sum = V::add(V::load(at), V::load(bias + n));
          V::store(at, last ? sum : gelu(sum));
        }
      std::swap(in, out);
      width = next;
    }
  }

  // (x - mean) / deviation
  void normalise(const float* x, long n, float* y) const {
    const float mean = sum(n, [&](long i) { return V::load(x + i); }, [&](long i) { return x[i]; }) / float(n);
    const typename V::f middle = V::all(mean);
    for (long i = 0; i + V::W <= n; i += V::W) V::store(y + i, V::sub(V::load(x + i), middle));
    for (long i = n / V::W * V::W; i < n; ++i) y[i] = x[i] - mean;
    const auto square = [&](long i) {
      const typename V::f d = V::load(y + i);
      return V::mul(d, d);
    };
    const float factor = 1.f / std::sqrt(sum(n, square, [&](long i) { return y[i] * y[i]; }) / float(n) + c_.epsilon);
    for (long i = 0; i + V::W <= n; i += V::W) V::store(y + i, V::mul(V::load(y + i), V::all(factor)));
    for (long i = n / V::W * V::W; i < n; ++i) y[i] *= factor;
  }

  template <class F, class G>
  static BSA_INLINE float sum(long n, const F& vector, const G& one) {
    typename V::f lanes = V::all(0.f);
    long i = 0;
    for (; i + V::W <= n; i += V::W) lanes = V::add(lanes, vector(i));
    float each[V::W], total = 0.f;
    V::store(each, lanes);
    for (float x : each) total += x;
    for (; i < n; ++i) total += one(i);
    return total;
  }

  // x Φ(x), with Φ of negative x as a product of exp(-x² / 2): Abramowitz and Stegun, 7.1.26, off by 1.5e-7 at most.
  static BSA_INLINE typename V::f gelu(typename V::f x) {
    const typename V::f zero = V::all(0.f), size = V::max(x, V::sub(zero, x));
    const typename V::f t = V::all(1.f) / V::fma(size, V::all(0.3275911f * 0.70710678f), V::all(1.f));
    typename V::f p = V::all(1.061405429f);
    p = V::fma(p, t, V::all(-1.453152027f));
    p = V::fma(p, t, V::all(1.421413741f));
    p = V::fma(p, t, V::all(-0.284496736f));
    p = V::fma(p, t, V::all(0.254829592f));
    const typename V::f tail = V::mul(V::mul(p, t), exp2<V>(V::mul(V::mul(x, x), V::all(-0.5f * kLog2e))));
    const typename V::f finite = V::max(V::sub(zero, size), V::all(-1e30f));  // an infinity times a tail of 0 would be NaN
    return V::fma(finite, V::mul(V::all(0.5f), tail), V::max(x, zero));
  }

  const bsa_perceptron& c_;
};

// Only engines whose operands are f32 have it.
template <class V>
int run_perceptron_on(const bsa_perceptron& c) {
  if constexpr (V::PAIR == 1 && !V::TILES) return Perceptron<V>(c).run();
  (void)c;
  return BSA_NO_ISA;
}

}  // namespace
