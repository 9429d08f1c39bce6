// Random problems for what a gate calls: best blocks, lists, perceptrons and scores, each against its definition.
#pragma once
#include <algorithm>
#include <cmath>
#include <numeric>
#include <vector>

namespace {

template <class T>
std::vector<T> zeros(long count) {
  return std::vector<T>(static_cast<size_t>(count));
}

std::vector<float> numbers(Rng& g, long count) {
  auto x = zeros<float>(count);
  for (float& v : x) v = float(uniform(g, -64, 64)) / 32;
  return x;
}

bool close(float got, double want) { return std::fabs(got - want) <= 1e-4 * (1 + std::fabs(want)); }

bool best_blocks(Rng& g, int isa, int threads) {
  bsa_best c{};
  c.abi_version = BSA_ABI_VERSION, c.isa = isa, c.num_threads = threads;
  c.rows = uniform(g, 0, 40), c.columns = uniform(g, 1, 90), c.slots = uniform(g, 0, 30);
  const auto scores = numbers(g, c.rows * c.columns);
  auto counts = zeros<int64_t>(c.rows), picked = zeros<int64_t>(c.rows * c.slots);
  auto scratch = zeros<int32_t>(threads * c.columns);
  for (auto& n : counts) n = uniform(g, 0, int(std::min(c.slots, c.columns)));
  c.scores = scores.data(), c.counts = counts.data(), c.picked = picked.data(), c.scratch = scratch.data();
  bool fine = bsa_best_blocks(&c) == BSA_OK;
  for (long r = 0; r < c.rows; ++r) {
    auto want = zeros<int64_t>(c.columns);
    std::iota(want.begin(), want.end(), 0);
    const float* row = c.scores + r * c.columns;
    std::stable_sort(want.begin(), want.end(), [&](int64_t a, int64_t b) { return row[a] > row[b]; });
    std::sort(want.begin(), want.begin() + counts[r]);
    fine = fine && std::equal(want.begin(), want.begin() + counts[r], picked.begin() + r * c.slots);
  }
  return fine;
}

bool lists(Rng& g, int threads) {
  bsa_lists c{};
  c.abi_version = BSA_ABI_VERSION, c.num_threads = threads, c.heads = uniform(g, 0, 5);
  c.q_blocks = uniform(g, 1, 40), c.kv_blocks = uniform(g, 1, 40), c.slots = uniform(g, 0, int(c.kv_blocks));
  c.band_lo = -uniform(g, 1, 200), c.band_hi = uniform(g, 0, 1) ? 0 : 1 << 30;
  const long rows = c.heads * c.q_blocks, slots = rows * c.slots, columns = c.heads * c.kv_blocks;
  std::vector<int64_t> picked, counts;
  for (long r = 0; r < rows; ++r) {
    auto row = zeros<int64_t>(c.kv_blocks);
    std::iota(row.begin(), row.end(), 0);
    for (size_t i = row.size(); i > 1; --i) std::swap(row[i - 1], row[uniform(g, 0, int(i) - 1)]);
    row.resize(size_t(c.slots));
    counts.push_back(uniform(g, 0, int(c.slots)));
    if (uniform(g, 0, 1)) std::sort(row.begin(), row.begin() + counts.back());
    picked.insert(picked.end(), row.begin(), row.end());
  }
  auto bounds = zeros<int32_t>(std::max(c.q_blocks, c.kv_blocks) + 1);
  for (size_t i = 0; i < bounds.size(); ++i) bounds[i] = int32_t(8 * i);
  auto begin = zeros<int32_t>(rows), end = begin, order = begin, indices = zeros<int32_t>(slots), entries = indices, t_rows = indices, t_slots = indices;
  auto col_begin = zeros<int32_t>(columns), col_end = col_begin, col_order = col_begin;
  auto scratch = zeros<int32_t>(std::max({c.heads, c.slots + 1, c.q_blocks + 1}));
  auto partial = zeros<uint8_t>(slots);
  int32_t unclear = 0;
  c.picked = picked.data(), c.counts = counts.data(), c.unclear = &unclear, c.scratch = scratch.data(), c.partial = partial.data();
  c.q_bounds = c.kv_bounds = c.q_start = c.kv_start = bounds.data();
  c.row_begin = begin.data(), c.row_end = end.data(), c.row_order = order.data(), c.indices = indices.data(), c.entries = entries.data();
  c.t_rows = t_rows.data(), c.t_slots = t_slots.data();
  c.col_begin = col_begin.data(), c.col_end = col_end.data(), c.col_order = col_order.data();
  bool fine = bsa_batched_lists(&c) == BSA_OK;
  auto listed = zeros<int>(slots);
  for (long r = 0; r < rows; ++r) {
    const long first = 8 * (r % c.q_blocks), last = first + 7;
    std::vector<int32_t> want;
    for (long s = r * c.slots; s < r * c.slots + counts[r]; ++s) {
      const long near = 8 * picked[s] - last, far = 8 * picked[s] + 7 - first;
      if (near <= c.band_hi && far >= c.band_lo) want.push_back(int32_t(picked[s]));
    }
    std::sort(want.begin(), want.end());
    const auto from = indices.begin() + begin[r];
    fine = fine && end[r] - begin[r] == long(want.size()) && std::equal(want.begin(), want.end(), from);
    for (long s = begin[r]; s < end[r]; ++s) fine = fine && picked[entries[s]] == indices[s];
  }
  for (long x = 0; x < columns; ++x)
    for (long t = col_begin[x]; t < col_end[x]; ++t) {
      const long s = t_slots[t], row = x / c.kv_blocks * c.q_blocks + t_rows[t];
      fine = fine && indices[s] == x % c.kv_blocks && s >= begin[row] && s < end[row] && !listed[s]++;
    }
  const auto used = std::accumulate(listed.begin(), listed.end(), 0L);
  const auto length = [&](long r) { return long(end[r] - begin[r]); };
  long kept = 0;
  for (long r = 0; r < rows; ++r) kept += length(r), fine = fine && (r == 0 || length(order[r]) <= length(order[r - 1]));
  return fine && used == kept;
}

bool perceptron(Rng& g, int isa, int threads) {
  bsa_perceptron c{};
  c.abi_version = BSA_ABI_VERSION, c.isa = isa, c.num_threads = threads, c.layers = int32_t(uniform(g, 1, 3)), c.epsilon = 1e-5f;
  c.batch = uniform(g, 0, 2), c.heads = uniform(g, 1, 3), c.rows = uniform(g, 0, 60), c.widest = c.widths[0] = uniform(g, 1, 70);
  std::vector<std::vector<float>> weights, biases;
  for (int i = 0; i < c.layers; ++i) {
    c.widths[i + 1] = BSA_LANES * uniform(g, 1, 3), c.widest = std::max(c.widest, c.widths[i + 1]);
    weights.push_back(numbers(g, c.heads * c.widths[i] * c.widths[i + 1])), biases.push_back(numbers(g, c.heads * c.widths[i + 1]));
    for (float& w : weights.back()) w /= 8;
    c.weights[i] = weights.back().data(), c.biases[i] = biases.back().data();
  }
  const auto x = numbers(g, c.batch * c.heads * c.rows * c.widths[0]);
  auto out = zeros<float>(c.batch * c.heads * c.rows * c.widths[c.layers]), scratch = zeros<float>(threads * 2 * BSA_PERCEPTRON_ROWS * c.widest);
  c.x = x.data(), c.out = out.data(), c.scratch = scratch.data();
  bool fine = bsa_head_perceptron(&c) == BSA_OK;
  for (long r = 0; r < c.batch * c.heads * c.rows; ++r) {
    const long head = r / c.rows % c.heads;
    std::vector<double> now(x.begin() + r * c.widths[0], x.begin() + (r + 1) * c.widths[0]);
    const double mean = std::accumulate(now.begin(), now.end(), 0.0) / double(now.size());
    double variance = 0;
    for (double& v : now) v -= mean, variance += v * v / double(now.size());
    for (double& v : now) v /= std::sqrt(variance + 1e-5);
    for (int i = 0; i < c.layers; ++i) {
      auto next = zeros<double>(c.widths[i + 1]);
      for (long n = 0; n < c.widths[i + 1]; ++n) {
        double sum = c.biases[i][head * c.widths[i + 1] + n];
        for (long k = 0; k < c.widths[i]; ++k) sum += now[k] * c.weights[i][(head * c.widths[i] + k) * c.widths[i + 1] + n];
        next[n] = i + 1 == c.layers ? sum : sum * (1 + std::erf(sum / std::sqrt(2.0))) / 2;
      }
      now = next;
    }
    for (size_t n = 0; n < now.size(); ++n) fine = fine && close(out[r * now.size() + n], now[n]);
  }
  return fine;
}

bool block_scores(Rng& g, int isa, int threads) {
  bsa_scores c{};
  c.abi_version = BSA_ABI_VERSION, c.isa = isa, c.num_threads = threads, c.scale = 0.5f;
  const long terms = uniform(g, 0, 2);
  c.means = terms != 1, c.extremes = terms != 0, c.kv_parts = terms ? 3 : 1, c.q_parts = uniform(g, 1, 2);
  c.batch = uniform(g, 0, 2), c.kv_heads = uniform(g, 1, 2), c.q_heads = c.kv_heads * uniform(g, 1, 2);
  c.q_blocks = uniform(g, 0, 60), c.kv_blocks = uniform(g, 1, 150), c.dim = uniform(g, 1, 20), c.rank = uniform(g, 1, 20);
  const auto queries = numbers(g, c.batch * c.q_heads * c.q_blocks * c.q_parts * c.dim), f = numbers(g, c.batch * c.q_heads * c.q_blocks * c.rank);
  const auto keys = numbers(g, c.batch * c.kv_heads * c.kv_blocks * c.kv_parts * c.dim), e = numbers(g, c.batch * c.kv_heads * c.kv_blocks * c.rank);
  const auto gain = numbers(g, c.q_heads * 2), slope = numbers(g, c.q_heads), distance = numbers(g, c.q_blocks * c.kv_blocks);
  const auto whole = [](long n) { return (n + BSA_LANES - 1) / BSA_LANES * BSA_LANES; };
  const long width = whole(c.dim * (c.means + 2 * c.extremes)) + whole(c.rank);
  c.workspace_floats = c.batch * c.kv_heads * width * whole(c.kv_blocks) + threads * BSA_SCORE_ROWS * (width + BSA_SCORE_LANES);
  auto workspace = zeros<float>(c.workspace_floats), scores = zeros<float>(c.batch * c.q_heads * c.q_blocks * c.kv_blocks);
  c.queries = queries.data(), c.keys = keys.data(), c.f = f.data(), c.g = e.data(), c.gain = gain.data(), c.slope = slope.data();
  c.distance = distance.data(), c.scores = scores.data(), c.workspace = workspace.data();
  bool fine = bsa_block_scores(&c) == BSA_OK;
  for (size_t x = 0; x < scores.size(); ++x) {
    const long j = long(x) % c.kv_blocks, i = long(x) / c.kv_blocks % c.q_blocks, of = long(x) / c.kv_blocks / c.q_blocks, h = of % c.q_heads;
    const long key = (of / c.q_heads * c.kv_heads + h / (c.q_heads / c.kv_heads)) * c.kv_blocks + j, query = of * c.q_blocks + i;
    double sum = double(slope[h]) * distance[i * c.kv_blocks + j];
    for (long r = 0; r < c.rank; ++r) sum += double(f[query * c.rank + r]) * e[key * c.rank + r];
    for (long d = 0; d < c.dim; ++d) {
      const double mean = queries[query * c.q_parts * c.dim + d];
      const float* const parts = keys.data() + key * c.kv_parts * c.dim + d;
      if (c.means) sum += gain[2 * h] * 0.5 * mean * parts[0];
      if (c.extremes) sum += gain[2 * h + 1] * 0.5 * mean * parts[(mean > 0 ? 1 : 2) * c.dim];
    }
    fine = fine && close(scores[x], sum);
  }
  return fine;
}

// How many of the four went wrong.
int gate(long number) {
  Rng g{unsigned(number) + 1000};
  int wrong = !lists(g, int(uniform(g, 1, 3)));
  for (int isa = 0; isa < BSA_ISA_COUNT; ++isa) {
    if (!bsa_isa_supported(isa)) continue;
    const int threads = int(uniform(g, 1, 3));
    wrong += !best_blocks(g, isa, threads) + !perceptron(g, isa, threads) + !block_scores(g, isa, threads);
  }
  if (wrong) std::printf("problem %ld: %d calls of a gate went wrong\n", number, wrong);
  return wrong;
}

}  // namespace
