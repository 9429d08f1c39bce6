// A small problem through one engine and the portable one: forward and backward with grouped heads, ragged blocks, a causal mask and
// sizes that fill no tile. An engine that was never seen on a machine runs there only after this.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <vector>

#include "engine.h"

namespace {

struct SelfTest {
  static constexpr int64_t kQueries = 106, kKeys = 150, kHeads = 2, kDim = 72, kValueDim = 40, kRows = 2, kColumns = 3;
  struct Results {
    std::vector<float> out, lse, dq, dk, dv;
  };

  std::vector<uint16_t> q, k, v, dout;
  std::vector<float> delta;
  bsa_call call{};

  SelfTest() {
    q = numbers(kQueries * kHeads * kDim), k = numbers(kKeys * kDim), v = numbers(kKeys * kValueDim);
    dout = numbers(kQueries * kHeads * kValueDim);
    delta.assign(kQueries * kHeads, 0.25f);
    bsa_call& c = call;
    c.abi_version = BSA_ABI_VERSION, c.num_threads = 1, c.dtype = BSA_BF16, c.result_dtype = BSA_F32;
    c.batch = 1, c.q_heads = kHeads, c.kv_heads = 1, c.q_len = kQueries, c.kv_len = kKeys, c.dim = kDim, c.v_dim = kValueDim;
    c.scale = 0.125f, c.layouts = c.layout_heads = 1, c.q_blocks = kRows, c.kv_blocks = kColumns;
    c.band_lo = -(int64_t(1) << 40), c.band_hi = 0;
    // Row 0 reads key blocks 0 and 1, row 1 reads all.
    static const int32_t row_begin[] = {0, 2}, row_end[] = {2, 5}, indices[] = {0, 1, 0, 1, 2}, entries[] = {0, 1, 2, 3, 4};
    static const int32_t col_begin[] = {0, 2, 4}, col_end[] = {2, 4, 5}, t_rows[] = {0, 1, 0, 1, 1}, t_slots[] = {0, 2, 1, 3, 4};
    static const int32_t row_order[] = {1, 0}, col_order[] = {0, 1, 2};
    static const int32_t q_bounds[] = {0, 67, 106}, kv_bounds[] = {0, 45, 112, 150}, q_start[] = {44, 111}, kv_start[] = {0, 45, 112};
    c.row_begin = row_begin, c.row_end = row_end, c.indices = indices, c.entries = entries, c.col_begin = col_begin;
    c.col_end = col_end, c.t_rows = t_rows, c.t_slots = t_slots, c.row_order = row_order, c.col_order = col_order;
    c.q_bounds = q_bounds, c.kv_bounds = kv_bounds, c.q_start = q_start, c.kv_start = kv_start;
    c.q = {q.data(), 0, kHeads * kDim, kDim}, c.k = {k.data(), 0, kDim, 0}, c.v = {v.data(), 0, kValueDim, 0};
    c.dout = {dout.data(), 0, kHeads * kValueDim, kValueDim};
    c.delta = delta.data();
  }

  // Backward reads the log-sum-exp of `forward` if given, so that both engines compute the same function.
  Results run(const bsa_engine& engine, const Results* reference) {
    Results r;
    bsa_call c = call;
    r.out.resize(kQueries * kHeads * kValueDim), r.lse.resize(kQueries * kHeads), r.dq.resize(kQueries * kHeads * kDim);
    r.dk.resize(kKeys * kDim), r.dv.resize(kKeys * kValueDim);
    c.out = {r.out.data(), 0, kHeads * kValueDim, kValueDim}, c.lse = r.lse.data();
    c.dq = {r.dq.data(), 0, kHeads * kDim, kDim}, c.dk = {r.dk.data(), 0, kDim, 0}, c.dv = {r.dv.data(), 0, kValueDim, 0};
    execute(engine.forward, c);
    if (reference) c.lse = const_cast<float*>(reference->lse.data());
    execute(engine.backward, c);
    return r;
  }

  bool agrees(const bsa_engine& engine, const bsa_engine& portable) {
    const Results want = run(portable, nullptr), got = run(engine, &want);
    return near(got.out, want.out) && near(got.lse, want.lse) && near(got.dq, want.dq) && near(got.dk, want.dk) && near(got.dv, want.dv);
  }

 private:
  // bf16 numbers in (-2, 2) from a linear congruential generator.
  std::vector<uint16_t> numbers(int64_t n) {
    std::vector<uint16_t> x(static_cast<size_t>(n));
    for (uint16_t& h : x) {
      seed_ = seed_ * 1664525u + 1013904223u;
      const float value = float(int32_t(seed_)) * 0x1p-30f;
      uint32_t bits;
      std::memcpy(&bits, &value, 4);
      h = uint16_t(bits >> 16);
    }
    return x;
  }

  static void execute(int (*function)(const bsa_call*, int64_t*), bsa_call& c) {
    int64_t need = 0;
    function(&c, &need);
    std::vector<char> memory(size_t(need) + 64);
    void* p = memory.data();
    size_t space = memory.size();
    c.workspace = std::align(64, size_t(need), p, space);
    c.workspace_bytes = need;
    function(&c, nullptr);
  }

  // Probabilities are rounded to bf16 by one engine and not by the other: 2^-9 of each term. A misplaced tile is off by order 1.
  static bool near(const std::vector<float>& got, const std::vector<float>& want) {
    float largest = 0.f, error = 0.f;
    for (size_t i = 0; i < want.size(); ++i) {
      const float e = std::fabs(got[i] - want[i]);
      if (!(e <= error)) error = e;  // keeps a NaN
      if (std::fabs(want[i]) > largest) largest = std::fabs(want[i]);
    }
    return error <= largest * 0x1p-7f;
  }

  uint32_t seed_ = 1;
};

}  // namespace
