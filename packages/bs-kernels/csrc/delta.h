// What a backward pass subtracts from every dP of a query: rowsum(dout * out), less the gradient that arrives through the LSE.
#pragma once
#include "problem.h"

namespace {

// Reads dout and out once, token by token, so that neighbouring heads share pages; no temporaries.
template <class V>
class Delta {
 public:
  explicit Delta(const bsa_call& c) : c_(c) {}

  int run() const {
    const long chunks = (c_.q_len + kTokens - 1) / kTokens, items = c_.batch * chunks;
    Counter work;
    const bool small = items * kTokens * c_.q_heads * c_.v_dim < 1L << 17;  // waking threads would cost more
    run_team(small ? 1 : c_.num_threads, [&](int) {
      for (long x; (x = work.take()) < items;) {
        const long b = x / chunks, from = x % chunks * kTokens, to = from + kTokens;
        for (long t = from; t < to && t < c_.q_len; ++t)
          for (long h = 0; h < c_.q_heads; ++h) {
            const long row = (b * c_.q_heads + h) * c_.q_len + t;
            const float sum = dot(at(c_.dout, c_.dtype, b, t, h), at(c_.out, c_.result_dtype, b, t, h));
            c_.delta[row] = c_.lse[row] == -kInf ? 0.f : c_.dlse ? sum - c_.dlse[row] : sum;
          }
      }
    });
    return BSA_OK;
  }

 private:
  static constexpr long kTokens = 32;

  float dot(const char* x, const char* y) const {
    typename V::f total = V::all(0.f);
    const long whole = c_.v_dim / V::W * V::W, rest = c_.v_dim - whole;
    const long x_step = element_size(c_.dtype), y_step = element_size(c_.result_dtype);
    for (long i = 0; i < whole; i += V::W)
      total = V::fma(widen<V>(x + i * x_step, c_.dtype), widen<V>(y + i * y_step, c_.result_dtype), total);
    if (rest) {
      float a[V::W], b[V::W];
      widen_row<V>(x + whole * x_step, c_.dtype, rest, a, V::W);
      widen_row<V>(y + whole * y_step, c_.result_dtype, rest, b, V::W);
      total = V::fma(V::load(a), V::load(b), total);
    }
    float lane[V::W];
    V::store(lane, total);
    for (int half = V::W / 2; half; half /= 2)
      for (int l = 0; l < half; ++l) lane[l] += lane[l + half];
    return lane[0];
  }

  const bsa_call& c_;
};

}  // namespace
