// Runs the core over random problems on every instruction set of this machine, against a loop in double precision. Made for
// the sanitizers: every buffer is an exact heap allocation, so one element too far is an error. Usage: driver [problems]
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <vector>

#include "../call.h"
#if defined(BSA_TRAPPED_TILES)
#include "trapped_tiles.h"
#endif

namespace {

using Rng = std::mt19937;
long uniform(Rng& g, long lo, long hi) { return std::uniform_int_distribution<long>(lo, hi)(g); }
bool chance(Rng& g, double p) { return std::bernoulli_distribution(p)(g); }

float widen(const void* p, int dtype, long i) {
  if (dtype == BSA_F32) return static_cast<const float*>(p)[i];
  const uint16_t h = static_cast<const uint16_t*>(p)[i];
  if (dtype == BSA_BF16) {
    const uint32_t bits = uint32_t(h) << 16;
    float x;
    std::memcpy(&x, &bits, 4);
    return x;
  }
  const int exponent = h >> 10 & 31, fraction = h & 1023;
  const float x = exponent ? std::ldexp(1024.f + fraction, exponent - 25) : std::ldexp(float(fraction), -24);
  return h & 0x8000 ? -x : x;
}

// A [batch, token, head, dim] tensor with gaps between its rows.
struct Tensor {
  int dtype;
  long batch, tokens, heads, dim, pad;
  std::vector<char> bytes;
  long row() const { return dim + pad; }
  long index(long b, long t, long h, long d) const { return ((b * tokens + t) * heads + h) * row() + d; }
  double get(long b, long t, long h, long d) const { return widen(bytes.data(), dtype, index(b, t, h, d)); }
  bsa_tensor view() { return {bytes.data(), tokens * heads * row(), heads * row(), row()}; }
  Tensor(Rng& g, int type, long b, long t, long h, long d, bool fill)
      : dtype(type), batch(b), tokens(t), heads(h), dim(d), pad(uniform(g, 0, 2)) {
    // The last row ends where its elements end.
    const long n = b * t * h * row() - pad;
    bytes.resize(size_t(n < 0 ? 0 : n) * (type == BSA_F32 ? 4 : 2));
    if (!fill) return;
    std::normal_distribution<float> normal;
    for (long i = 0; i < n; ++i) {
      const float x = normal(g);
      if (type == BSA_F32) {
        std::memcpy(bytes.data() + i * 4, &x, 4);
      } else {
        uint32_t bits;
        std::memcpy(&bits, &x, 4);
        // Cut to 8 bits of fraction at most; f16 takes values in [2^-14, 8) only, which is all that the test needs.
        const uint16_t half = std::fabs(x) < 0x1p-14f ? 0 : uint16_t((bits >> 16 & 0x8000) | (((bits & 0x7fffffff) - 0x38000000) >> 13));
        const uint16_t h = type == BSA_BF16 ? uint16_t(bits >> 16) : half;
        std::memcpy(bytes.data() + i * 2, &h, 2);
      }
    }
  }
};

struct Problem {
  bsa_call c{};
  std::vector<int32_t> row_begin, row_end, indices, entries, col_begin, col_end, t_rows, t_slots, row_order, col_order, q_bounds, kv_bounds, q_start,
      kv_start, q_segments, kv_segments, pages;
  std::vector<uint8_t> padding;
  std::vector<float> sinks;
  std::vector<float> bias, attn_bias;
  std::vector<uint8_t> attn_mask;
  std::vector<bool> active;    // [layouts, heads, q_blocks, kv_blocks]
  std::vector<int32_t> slots;  // of the active ones
  int64_t seed = 0;
  long page_size = 0;  // 0 without pages
  // Where key n of batch element b lies in k and v.
  long key_batch(long b, long n) const { return page_size ? pages[b * c.kv_blocks + block_of(n)] : b; }
  long key_token(long n) const { return page_size ? n - kv_bounds_at(block_of(n)) : n; }
  long key_batches() const { return page_size ? c.pages : c.batch; }
  long key_tokens() const { return page_size ? page_size : c.kv_len; }
  long kv_bounds_at(long j) const { return kv_bounds[size_t(j)]; }
  long block_of(long n) const {
    long j = 0;
    while (kv_bounds_at(j + 1) <= n) ++j;
    return j;
  }
  // Place of a pair in attn_bias, and in its gradient.
  long pair(long b, long h, long t, long n) const {
    return b * c.attn_bias_batch + h * c.attn_bias_head + t * c.attn_bias_query + n * c.attn_bias_key;
  }
  // 0, or what a kept probability is multiplied by; Philox4x32-10 word by word.
  double kept(long b, long h, long query, long key) const {
    if (!c.dropout_seed) return 1;
    uint32_t x[4] = {uint32_t(c.first_batch + b), uint32_t(c.first_head + h), uint32_t(query), uint32_t(key)};
    uint32_t k0 = uint32_t(seed), k1 = uint32_t(uint64_t(seed) >> 32);
    for (int round = 0; round < 10; ++round, k0 += 0x9E3779B9u, k1 += 0xBB67AE85u) {
      const uint64_t p0 = uint64_t(0xD2511F53u) * x[0], p1 = uint64_t(0xCD9E8D57u) * x[2];
      const uint32_t y[4] = {uint32_t(p1 >> 32) ^ x[1] ^ k0, uint32_t(p1), uint32_t(p0 >> 32) ^ x[3] ^ k1, uint32_t(p0)};
      std::memcpy(x, y, sizeof x);
    }
    return x[0] >= c.dropout_threshold ? double(c.dropout_scale) : 0;
  }
  long place(long b, long h, long i, long j) const {
    const long l = c.layouts == 1 ? 0 : b, x = c.layout_heads == 1 ? 0 : h;
    return ((l * c.layout_heads + x) * c.q_blocks + i) * c.kv_blocks + j;
  }
  bool is_active(long b, long h, long i, long j) const { return active[place(b, h, i, j)]; }
  float bias_at(long b, long h, long i, long j) const {
    return bias.empty() ? 0.f : bias[(b * c.q_heads + h) * c.bias_entries + slots[place(b, h, i, j)]];
  }
};

std::vector<int32_t> cut(Rng& g, long length, long block, bool ragged) {
  std::vector<int32_t> bounds{0};
  for (long at = 0; at < length;) {
    at += ragged ? uniform(g, 1, block) : block;
    bounds.push_back(int32_t(at < length ? at : length));
  }
  return bounds;
}

Problem make(Rng& g) {
  Problem p;
  bsa_call& c = p.c;
  c.abi_version = BSA_ABI_VERSION;
  c.batch = uniform(g, 1, 2), c.kv_heads = uniform(g, 1, 3), c.q_heads = c.kv_heads * uniform(g, 1, 2);
  c.q_len = uniform(g, 1, 150), c.kv_len = uniform(g, 1, 200), c.dim = uniform(g, 1, 72), c.v_dim = uniform(g, 1, 72);
  c.scale = float(1 / std::sqrt(double(c.dim)));
  c.layouts = chance(g, .5) ? 1 : c.batch, c.layout_heads = chance(g, .5) ? 1 : c.q_heads;
  p.q_bounds = cut(g, c.q_len, uniform(g, 1, 140), chance(g, .3)), p.kv_bounds = cut(g, c.kv_len, uniform(g, 16, 140), chance(g, .3));
  c.q_blocks = long(p.q_bounds.size()) - 1, c.kv_blocks = long(p.kv_bounds.size()) - 1;
  for (long i = 0; i < c.q_blocks; ++i) p.q_start.push_back(p.q_bounds[i] + int32_t(c.kv_len - c.q_len));
  for (long j = 0; j < c.kv_blocks; ++j) p.kv_start.push_back(p.kv_bounds[j]);
  c.band_lo = chance(g, .3) ? -uniform(g, 0, 60) : -(1L << 30), c.band_hi = chance(g, .5) ? uniform(g, 0, 20) : 1L << 30;
  const double density = std::uniform_real_distribution<double>(0, 1.2)(g);
  for (long l = 0; l < c.layouts * c.layout_heads; ++l) {
    const long first = long(p.active.size());
    for (long x = 0; x < c.q_blocks * c.kv_blocks; ++x) p.active.push_back(chance(g, density < 1 ? density : 1));
    p.slots.resize(p.active.size());
    for (long i = 0; i < c.q_blocks; ++i) {
      p.row_begin.push_back(int32_t(p.indices.size()));
      for (long j = 0; j < c.kv_blocks; ++j)
        if (p.active[first + i * c.kv_blocks + j]) {
          p.slots[first + i * c.kv_blocks + j] = int32_t(p.indices.size());
          p.entries.push_back(int32_t(p.indices.size()));
          p.indices.push_back(int32_t(j));
        }
      p.row_end.push_back(int32_t(p.indices.size()));
      p.row_order.push_back(int32_t(l * c.q_blocks + c.q_blocks - 1 - i));
    }
    for (long j = 0; j < c.kv_blocks; ++j) {
      p.col_begin.push_back(int32_t(p.t_rows.size()));
      for (long i = 0; i < c.q_blocks; ++i)
        if (p.active[first + i * c.kv_blocks + j]) {
          p.t_slots.push_back(p.slots[first + i * c.kv_blocks + j]);
          p.t_rows.push_back(int32_t(i));
        }
      p.col_end.push_back(int32_t(p.t_rows.size()));
      p.col_order.push_back(int32_t(l * c.kv_blocks + j));
    }
  }
  c.entries = p.entries.data(), c.t_slots = p.t_slots.data(), c.row_begin = p.row_begin.data(), c.row_end = p.row_end.data(), c.indices = p.indices.data();
  c.col_begin = p.col_begin.data(), c.col_end = p.col_end.data(), c.t_rows = p.t_rows.data();
  c.row_order = p.row_order.data(), c.col_order = p.col_order.data(), c.q_bounds = p.q_bounds.data();
  c.kv_bounds = p.kv_bounds.data(), c.q_start = p.q_start.data(), c.kv_start = p.kv_start.data();
  if (chance(g, .3)) {
    for (long n = 0; n < c.batch * c.kv_len; ++n) p.padding.push_back(chance(g, .8));
    c.key_padding = p.padding.data();
  }
  if (chance(g, .3)) {
    for (long n = 0; n < c.batch * c.q_len; ++n) p.q_segments.push_back(int32_t(n / 40 % 3));
    for (long n = 0; n < c.batch * c.kv_len; ++n) p.kv_segments.push_back(int32_t(n / 50 % 3));
    c.q_segments = p.q_segments.data(), c.kv_segments = p.kv_segments.data();
  }
  c.bias_entries = long(p.indices.size());
  if (chance(g, .3)) {
    int64_t* const strides[] = {&c.attn_bias_batch, &c.attn_bias_head, &c.attn_bias_query, &c.attn_bias_key};
    const int64_t sizes[] = {c.batch, c.q_heads, c.q_len, c.kv_len};
    long n = 1;
    for (int d = 3; d >= 0; --d) {
      const bool whole = sizes[d] > 1 && chance(g, .5);
      *strides[d] = whole ? n : 0;
      n *= whole ? sizes[d] : 1;
    }
    c.attn_bias_bool = chance(g, .3);
    for (long x = 0; x < n; ++x) {
      if (c.attn_bias_bool)
        p.attn_mask.push_back(chance(g, .7));
      else
        p.attn_bias.push_back(float(uniform(g, -8, 8)) / 4);
    }
    c.attn_bias = c.attn_bias_bool ? static_cast<const void*>(p.attn_mask.data()) : p.attn_bias.data();
  }
  if (chance(g, .3)) {
    const double drop = std::uniform_real_distribution<double>(0, .8)(g);
    c.dropout_threshold = uint32_t(drop * 0x1p32), c.dropout_scale = float(1 / (1 - drop));
    p.seed = int64_t(uint64_t(uniform(g, 0, 1L << 62)) * 3);
    c.first_batch = uniform(g, 0, 3), c.first_head = uniform(g, 0, 3);
    c.dropout_seed = &p.seed;  // the caller points it at its own copy
  }
  if (chance(g, .4)) {
    const bool shared = chance(g, .5);
    const long pairs = c.batch * c.kv_blocks;
    c.pages = shared ? (pairs + 1) / 2 : pairs + 2;
    for (long j = 0; j < c.kv_blocks; ++j) {
      const long size = p.kv_bounds[j + 1] - p.kv_bounds[j];
      p.page_size = size > p.page_size ? size : p.page_size;
    }
    for (long b = 0, x = 0; b < c.batch; ++b)
      for (long j = 0; j < c.kv_blocks; ++j, ++x) {
        bool read = false;
        for (long h = 0; h < c.q_heads; ++h)
          for (long i = 0; i < c.q_blocks; ++i) read |= p.is_active(b, h, i, j);
        p.pages.push_back(!read ? 1 << 30 : int32_t(shared ? uniform(g, 0, c.pages - 1) : pairs - x));
      }
  }
  if (chance(g, .3)) {
    for (long n = 0; n < c.batch * c.q_heads * c.bias_entries; ++n) p.bias.push_back(float(uniform(g, -8, 8)) / 4);
    c.block_bias = p.bias.data(), c.bias_batch = c.q_heads * c.bias_entries, c.bias_head = c.bias_entries;
  }
  if (chance(g, .3)) {
    for (long h = 0; h < c.q_heads; ++h) p.sinks.push_back(float(h) - 1.f);
    c.sinks = p.sinks.data();
  }
  return p;
}

struct Answer {
  std::vector<double> out, lse, dq, dk, dv, dbias, dattn;
};

// The definition, pair by pair.
Answer define(const Problem& p, const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& dout, const std::vector<float>& dlse,
              std::vector<float>& delta) {
  const bsa_call& c = p.c;
  Answer a;
  a.out.assign(size_t(c.batch * c.q_len * c.q_heads * c.v_dim), 0);
  a.lse.assign(size_t(c.batch * c.q_heads * c.q_len), -INFINITY);
  a.dq.assign(size_t(c.batch * c.q_len * c.q_heads * c.dim), 0);
  a.dk.assign(size_t(p.key_batches() * p.key_tokens() * c.kv_heads * c.dim), 0);
  a.dv.assign(size_t(p.key_batches() * p.key_tokens() * c.kv_heads * c.v_dim), 0);
  a.dattn.assign(p.attn_bias.size(), 0);
  a.dbias.assign(size_t(c.batch * c.q_heads * c.bias_entries), 0);
  delta.assign(a.lse.size(), 0);
  std::vector<double> s(size_t(c.kv_len), 0);
  for (long b = 0; b < c.batch; ++b)
    for (long h = 0; h < c.q_heads; ++h)
      for (long i = 0; i < c.q_blocks; ++i)
        for (long t = c.q_bounds[i]; t < c.q_bounds[i + 1]; ++t) {
          const long kh = h / (c.q_heads / c.kv_heads), x = (b * c.q_heads + h) * c.q_len + t;
          double top = c.sinks ? c.sinks[h] : -INFINITY;
          for (long j = 0; j < c.kv_blocks; ++j)
            for (long n = c.kv_bounds[j]; n < c.kv_bounds[j + 1]; ++n) {
              const long distance = c.kv_start[j] + n - c.kv_bounds[j] - (c.q_start[i] + t - c.q_bounds[i]);
              const bool kept = p.is_active(b, h, i, j) && distance >= c.band_lo && distance <= c.band_hi &&
                                (!c.key_padding || c.key_padding[b * c.kv_len + n]) &&
                                (!c.attn_bias_bool || p.attn_mask[size_t(p.pair(b, h, t, n))]) &&
                                (!c.q_segments || c.q_segments[b * c.q_len + t] == c.kv_segments[b * c.kv_len + n]);
              s[n] = -INFINITY;
              if (!kept) continue;
              s[n] = 0;
              for (long d = 0; d < c.dim; ++d) s[n] += q.get(b, t, h, d) * k.get(p.key_batch(b, n), p.key_token(n), kh, d);
              s[n] = s[n] * c.scale + p.bias_at(b, h, i, j);
              if (!p.attn_bias.empty()) s[n] += p.attn_bias[size_t(p.pair(b, h, t, n))];
              top = s[n] > top ? s[n] : top;
            }
          if (top == -INFINITY) continue;
          double sum = c.sinks ? std::exp(c.sinks[h] - top) : 0;
          for (long n = 0; n < c.kv_len; ++n) sum += std::exp(s[n] - top);
          a.lse[x] = top + std::log(sum);
          double* out = &a.out[((b * c.q_len + t) * c.q_heads + h) * c.v_dim];
          double* dq = &a.dq[((b * c.q_len + t) * c.q_heads + h) * c.dim];
          auto kept = [&](long n) {
            const long j = p.block_of(n);
            return p.kept(b, h, c.q_start[i] + t - c.q_bounds[i], c.kv_start[j] + n - c.kv_bounds[j]);
          };
          for (long n = 0; n < c.kv_len; ++n) {
            if (s[n] == -INFINITY) continue;
            const double weight = std::exp(s[n] - a.lse[x]) * kept(n);
            for (long d = 0; d < c.v_dim; ++d) out[d] += weight * v.get(p.key_batch(b, n), p.key_token(n), kh, d);
          }
          double rowsum = -dlse[x];
          for (long d = 0; d < c.v_dim; ++d) rowsum += dout.get(b, t, h, d) * out[d];
          delta[x] = float(rowsum);
          for (long n = 0; n < c.kv_len; ++n) {
            const double pn = std::exp(s[n] - a.lse[x]);
            if (pn == 0) continue;
            const long kb = p.key_batch(b, n), kt = p.key_token(n), key = (kb * p.key_tokens() + kt) * c.kv_heads + kh;
            const double keep = kept(n);
            double dp = 0;
            for (long d = 0; d < c.v_dim; ++d) dp += dout.get(b, t, h, d) * v.get(kb, kt, kh, d);
            const double pair = pn * (dp * keep - rowsum), ds = pair * c.scale;
            if (!p.bias.empty()) a.dbias[(b * c.q_heads + h) * c.bias_entries + p.slots[p.place(b, h, i, p.block_of(n))]] += pair;
            if (!p.attn_bias.empty()) a.dattn[size_t(p.pair(b, h, t, n))] += pair;
            for (long d = 0; d < c.v_dim; ++d) a.dv[key * c.v_dim + d] += pn * keep * dout.get(b, t, h, d);
            for (long d = 0; d < c.dim; ++d) {
              dq[d] += ds * k.get(kb, kt, kh, d);
              a.dk[key * c.dim + d] += ds * q.get(b, t, h, d);
            }
          }
        }
  return a;
}

int failures = 0;

// Compares relative to the largest entry, which is what rounding is relative to here.
void compare(const char* what, long problem, int isa, int dtype, const Tensor& got, const std::vector<double>& want, double epsilon) {
  double worst = 0, largest = 1e-3;
  size_t x = 0;
  for (long b = 0; b < got.batch; ++b)
    for (long t = 0; t < got.tokens; ++t)
      for (long h = 0; h < got.heads; ++h)
        for (long d = 0; d < got.dim; ++d, ++x) {
          const double error = std::fabs(got.get(b, t, h, d) - want[x]);
          if (!(error <= worst)) worst = error;
          if (std::fabs(want[x]) > largest) largest = std::fabs(want[x]);
        }
  if (!(worst <= 64 * epsilon * largest)) {
    std::printf("problem %ld, %s, dtype %d, %s: error %g of %g\n", problem, bsa_isa_name(isa), dtype, what, worst, largest);
    ++failures;
  }
}

void execute(const char* name, int (*function)(const bsa_call*, int64_t*), bsa_call& c) {
  int64_t need = 0;
  bool fine = function(&c, &need) == BSA_OK;
  c.workspace = std::aligned_alloc(64, size_t(need));  // the core plans in steps of 64 bytes
  c.workspace_bytes = need;
  fine = fine && c.workspace && function(&c, nullptr) == BSA_OK;
  std::free(c.workspace);
  if (!fine) std::printf("%s refused\n", name), std::exit(1);
}

// Mean, maximum and minimum of every key block, or the first `parts` of them.
void pool(long number, Rng& g, bsa_call c, const Tensor& k, long parts, double epsilon) {
  Tensor made(g, BSA_F32, c.batch, c.kv_blocks, c.kv_heads, parts * c.dim, false);
  c.v_dim = parts * c.dim, c.out = made.view();
  if (bsa_pool(&c) != BSA_OK) std::printf("pool refused\n"), std::exit(1);
  std::vector<double> want;
  for (long b = 0; b < c.batch; ++b)
    for (long j = 0; j < c.kv_blocks; ++j)
      for (long h = 0; h < c.kv_heads; ++h)
        for (long x = 0; x < parts * c.dim; ++x) {
          const long part = x / c.dim, from = c.kv_bounds[j], to = c.kv_bounds[j + 1];
          double sum = 0, top = k.get(b, from, h, x % c.dim), low = top;
          for (long n = from; n < to; ++n) {
            const double value = k.get(b, n, h, x % c.dim);
            sum += value, top = std::max(top, value), low = std::min(low, value);
          }
          want.push_back(part == 0 ? sum / double(to - from) : part == 1 ? top : low);
        }
  compare("pool", number, c.isa, c.dtype, made, want, epsilon);
}

void run(long number) {
  Rng g{unsigned(number)};
  Problem p = make(g);
  bsa_call& c = p.c;
  if (c.dropout_seed) c.dropout_seed = &p.seed;
  if (p.page_size) c.page_table = p.pages.data();
  for (int dtype : {BSA_F32, BSA_BF16, BSA_F16}) {
    Tensor q(g, dtype, c.batch, c.q_len, c.q_heads, c.dim, true), k(g, dtype, p.key_batches(), p.key_tokens(), c.kv_heads, c.dim, true);
    Tensor v(g, dtype, p.key_batches(), p.key_tokens(), c.kv_heads, c.v_dim, true), dout(g, dtype, c.batch, c.q_len, c.q_heads, c.v_dim, true);
    std::vector<float> dlse(size_t(c.batch * c.q_heads * c.q_len)), delta;
    for (float& x : dlse) x = float(uniform(g, -4, 4)) / 4;
    const Answer a = define(p, q, k, v, dout, dlse, delta);
    for (int isa = 0; isa < BSA_ISA_COUNT; ++isa) {
      if (!bsa_isa_supported(isa)) continue;
      const double epsilon = isa >= BSA_ISA_AVX512_BF16 && dtype == BSA_BF16 ? 0x1p-9 : 0x1p-24 * 8;
      Tensor out(g, BSA_F32, c.batch, c.q_len, c.q_heads, c.v_dim, false), dq(g, BSA_F32, c.batch, c.q_len, c.q_heads, c.dim, false);
      Tensor dk(g, BSA_F32, p.key_batches(), p.key_tokens(), c.kv_heads, c.dim, false);
      Tensor dv(g, BSA_F32, p.key_batches(), p.key_tokens(), c.kv_heads, c.v_dim, false);
      std::vector<float> lse(a.lse.size());
      c.isa = isa, c.num_threads = int32_t(uniform(g, 1, 3)), c.dtype = dtype, c.result_dtype = BSA_F32;
      c.q = q.view(), c.k = k.view(), c.v = v.view(), c.out = out.view(), c.dout = dout.view();
      c.dq = dq.view(), c.dk = dk.view(), c.dv = dv.view(), c.lse = lse.data(), c.delta = delta.data();
      execute("forward", bsa_forward, c);
      compare("out", number, isa, dtype, out, a.out, epsilon);
      for (size_t x = 0; x < lse.size(); ++x) {
        const bool same = std::isinf(a.lse[x]) ? lse[x] == a.lse[x] : std::fabs(lse[x] - a.lse[x]) < 1e-5 * (1 + std::fabs(a.lse[x]));
        if (!same) std::printf("problem %ld, %s: lse %g, not %g\n", number, bsa_isa_name(isa), lse[x], a.lse[x]), ++failures;
      }
      std::vector<float> sums(lse.size());
      c.dlse = dlse.data(), c.delta = sums.data();
      if (bsa_delta(&c) != BSA_OK) std::printf("delta refused\n"), std::exit(1);
      if (!c.page_table) pool(number, g, c, k, uniform(g, 1, 3), 0x1p-24 * 8);
      c.delta = delta.data();
      for (size_t x = 0; x < sums.size(); ++x)
        if (!(std::fabs(sums[x] - delta[x]) <= 64 * epsilon * 16))
          std::printf("problem %ld, %s: delta %g, not %g\n", number, bsa_isa_name(isa), sums[x], delta[x]), ++failures;
      std::vector<char> first;
      const int32_t some = int32_t(uniform(g, 1, c.kv_len > 1 ? c.kv_len : 1));
      for (const auto [split, stretch] : {std::pair{BSA_SPLIT_HEADS, 0}, {BSA_SPLIT_HEADS, some}, {BSA_SPLIT_BLOCKS, 0}}) {
        c.split = split, c.stretch = stretch;
        std::vector<float> dbias(p.bias.size());
        c.dblock_bias = p.bias.empty() ? nullptr : dbias.data();
        std::vector<float> dattn(p.attn_bias.size());
        c.dattn_bias = p.attn_bias.empty() ? nullptr : dattn.data();
        c.dattn_bias_batch = c.attn_bias_batch, c.dattn_bias_head = c.attn_bias_head;
        c.dattn_bias_query = c.attn_bias_query, c.dattn_bias_key = c.attn_bias_key;
        if (p.page_size) dk.bytes.assign(dk.bytes.size(), 0), dv.bytes.assign(dv.bytes.size(), 0);
        execute("backward", bsa_backward, c);
        compare("dq", number, isa, dtype, dq, a.dq, epsilon);
        compare("dk", number, isa, dtype, dk, a.dk, epsilon);
        compare("dv", number, isa, dtype, dv, a.dv, epsilon);
        for (size_t x = 0; x < dbias.size(); ++x)
          if (!(std::fabs(dbias[x] - a.dbias[x]) <= 64 * epsilon * 64)) std::printf("problem %ld: dbias\n", number), ++failures;
        for (size_t x = 0; x < dattn.size(); ++x)
          if (!(std::fabs(dattn[x] - a.dattn[x]) <= 64 * epsilon * (64 + std::fabs(a.dattn[x]))))
            std::printf("problem %ld, %s: dattn %g, not %g\n", number, bsa_isa_name(isa), dattn[x], a.dattn[x]), ++failures;
        std::vector<char> bits(dq.bytes);
        bits.insert(bits.end(), reinterpret_cast<char*>(dattn.data()), reinterpret_cast<char*>(dattn.data() + dattn.size()));
        bits.insert(bits.end(), reinterpret_cast<char*>(dbias.data()), reinterpret_cast<char*>(dbias.data() + dbias.size()));
        bits.insert(bits.end(), dk.bytes.begin(), dk.bytes.end());
        bits.insert(bits.end(), dv.bytes.begin(), dv.bytes.end());
        if (first.empty()) first = bits;
        if (bits != first) std::printf("problem %ld, %s: the splits differ\n", number, bsa_isa_name(isa)), ++failures;
      }
    }
  }
}

}  // namespace

#include "gate.h"

int main(int argc, char** argv) {
#if defined(BSA_TRAPPED_TILES)
  TrappedTiles::install();
#endif
  const long problems = argc > 1 ? std::atol(argv[1]) : 40;
  for (long n = 0; n < problems; ++n) run(n), failures += gate(n);
#if defined(BSA_TRAPPED_TILES)
  std::printf("%s: %ld tile instructions trapped\n", bsa_isa_supported(BSA_ISA_AMX_BF16) ? "amx_bf16 ran" : "amx_bf16 did not run",
              TrappedTiles::executed());
#endif
  std::printf("%ld problems, %d failures\n", problems, failures);
  return failures != 0;
}
