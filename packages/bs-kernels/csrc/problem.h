// What forward and backward share: workspace, key operands and the tasks.
#pragma once
#include <initializer_list>

#include "pack.h"
#include "softmax.h"
#include "team.h"

namespace {

constexpr long kKeys = 64;   // keys of a score tile: 8 KB with 32 lanes
constexpr long kTiles = 4;   // query tiles that share one pass over the keys

// The workspace of a call, cut into pieces.
class Arena {
 public:
  // Call for every piece, then open(), then take() the pieces in the same order.
  void plan(long bytes) { size_ += round_up(bytes, 64); }
  long size() const { return size_; }
  bool open(const bsa_call& c) {
    data_ = static_cast<char*>(c.workspace);
    return c.workspace_bytes >= size_;
  }
  template <class T>
  T* take(long count) {
    T* p = reinterpret_cast<T*>(data_ + used_);
    used_ += round_up(count * long(sizeof(T)), 64);
    return p;
  }

 private:
  char* data_ = nullptr;
  long size_ = 0, used_ = 0;
};

struct Layout {
  const bsa_call& c;
  explicit Layout(const bsa_call& call) : c(call) {}
  long head(long b, long h) const {
    return (c.layouts == 1 ? 0 : b) * c.layout_heads + (c.layout_heads == 1 ? 0 : h);
  }
  long row(long b, long h, long i) const { return head(b, h) * c.q_blocks + i; }
  long column(long b, long h, long j) const { return head(b, h) * c.kv_blocks + j; }
  long group() const { return c.q_heads / c.kv_heads; }
  bool shared() const { return c.layouts * c.layout_heads == 1; }
  long q_size(long i) const { return c.q_bounds[i + 1] - c.q_bounds[i]; }
  long kv_size(long j) const { return c.kv_bounds[j + 1] - c.kv_bounds[j]; }
  // How many queries read a key, on average.
  long queries_per_key() const {
    const long heads = c.layouts * c.layout_heads;
    long slots = 0;
    for (long r = 0; r < heads * c.q_blocks; ++r) slots += c.row_end[r] - c.row_begin[r];
    return heads && c.q_blocks && c.kv_blocks ? slots * (c.q_len / c.q_blocks) * group() / (heads * c.kv_blocks) : 0;
  }
  // Whether every row lists its keys in order.
  bool ascending() const {
    for (long r = 0; r < c.layouts * c.layout_heads * c.q_blocks; ++r)
      for (long x = c.row_begin[r] + 1; x < c.row_end[r]; ++x)
        if (c.indices[x] <= c.indices[x - 1]) return false;
    return true;
  }
  bool referenced(long b, long kv_head, long j) const {
    const long g = c.layout_heads == 1 ? 1 : group();
    for (long h = kv_head * g; h < kv_head * g + g; ++h) {
      const long x = column(b, c.layout_heads == 1 ? 0 : h, j);
      if (c.col_begin[x] < c.col_end[x]) return true;
    }
    return false;
  }
};

inline const char* at(const bsa_tensor& t, int dtype, long b, long token, long h) {
  return static_cast<const char*>(t.data) + (b * t.batch + token * t.token + h * t.head) * element_size(dtype);
}
inline char* at(bsa_tensor& t, int dtype, long b, long token, long h) {
  return static_cast<char*>(t.data) + (b * t.batch + token * t.token + h * t.head) * element_size(dtype);
}

// First token of a key block in k or v; follows the page table.
inline const char* block_at(const bsa_call& c, const bsa_tensor& t, long b, long j, long h) {
  if (c.page_table) return at(t, c.dtype, c.page_table[b * c.kv_blocks + j], 0, h);
  return at(t, c.dtype, b, c.kv_bounds[j], h);
}

// Keys or values as a product reads them: in place, or packed once per (batch, kv head) where a column is referenced.
template <class V>
class Operand {
 public:
  enum Form {
    Natural,  // one row per key
    Paired,   // for PAIR 2: one row per two keys, interleaved (for TILES: per 32 keys, see load_tiles); for PAIR 1 as Natural
  };
  Operand(const bsa_call& call, const bsa_tensor& tensor, long n, Form form)
      : c_(call), t_(tensor), n_(n), paired_(form == Paired && V::PAIR == 2) {
    // Rows that lie far apart share few cache sets, so they are packed even in the right form unless each is read only a few times.
    const bool fits = V::TILES ? n % 32 == 0 : V::PAIR == 2 ? n % 2 == 0 : c_.dtype == BSA_F32;
    const bool near = t_.token == n || Layout(c_).queries_per_key() < 256;
    packed_ = paired_ || !fits || !near;
    if (V::TILES)
      ld_ = paired_ ? round_up(n, 16) * 16 : round_up(units<V>(n), 16);
    else
      ld_ = paired_ ? n : units<V>(n);
  }
  bool packed() const { return packed_; }
  long bytes() const { return packed_ ? c_.batch * c_.kv_heads * rows() * ld_ * 4 : 0; }
  void use(float* memory) { memory_ = memory; }
  long row_bytes() const { return packed_ ? ld_ * 4 : t_.token * element_size(c_.dtype); }
  // Row of key `offset` of block j (a multiple of kKeyStep for pairs).
  const char* block(long b, long kv_head, long j, long offset) const {
    if (!packed_) return block_at(c_, t_, b, j, kv_head) + offset * row_bytes();
    return reinterpret_cast<const char*>(memory_ + row(b, kv_head, j) * ld_) + (paired_ ? offset / kKeyStep<V> : offset) * row_bytes();
  }
  // Rows that pack() takes at a time.
  long step() const { return paired_ ? kStep : 1; }
  // Packs `count` <= step() rows from key `offset` of block j, a multiple of step().
  void pack(long b, long kv_head, long j, long offset, long count) {
    const long stride = t_.token * element_size(c_.dtype);
    const char* src = block_at(c_, t_, b, j, kv_head) + offset * stride;
    float* dst = memory_ + row(b, kv_head, j) * ld_ + offset / step() * ld_;
    if (paired_ && V::TILES)
      load_tiles<V>(src, stride, count, n_, dst);
    else if (paired_)
      load_rows_paired<V>(src, stride, c_.dtype, count, n_, dst, ld_);
    else
      load_row<V>(src, c_.dtype, n_, dst, ld_);
  }

 private:
  // With pairs (or tiles) of keys every block has room for its own unfilled last one: rounding bounds[j] + j (step - 1) down
  // never lets two blocks overlap.
  static constexpr long kStep = kKeyStep<V>;
  long rows() const { return paired_ ? (c_.kv_len + c_.kv_blocks * (kStep - 1)) / kStep : c_.kv_len; }
  long row(long b, long kv_head, long j) const {
    const long first = paired_ ? (c_.kv_bounds[j] + j * (kStep - 1)) / kStep : c_.kv_bounds[j];
    return (b * c_.kv_heads + kv_head) * rows() + first;
  }
  const bsa_call& c_;
  const bsa_tensor& t_;
  long n_, ld_;
  bool paired_, packed_;
  float* memory_ = nullptr;
};

// Per (batch, key block): does key padding cut into it (1) or take it whole (2), and the range of its segment ids.
struct KeyBlocks {
  uint8_t* padded = nullptr;
  int32_t *lowest = nullptr, *highest = nullptr;
  static long bytes(const bsa_call& c) {
    return (c.key_padding ? round_up(c.batch * c.kv_blocks, 64) : 0) +
           (c.kv_segments ? 2 * round_up(c.batch * c.kv_blocks * 4, 64) : 0);
  }
  void take(const bsa_call& c, Arena& arena) {
    const long n = c.batch * c.kv_blocks;
    if (c.key_padding) padded = arena.take<uint8_t>(n);
    if (c.kv_segments) lowest = arena.take<int32_t>(n), highest = arena.take<int32_t>(n);
  }
  void fill(const bsa_call& c, long b, long j) {
    const long x = b * c.kv_blocks + j, from = b * c.kv_len + c.kv_bounds[j], to = b * c.kv_len + c.kv_bounds[j + 1];
    if (padded) {
      bool some = false, all = true;
      for (long n = from; n < to; ++n) c.key_padding[n] ? all = false : some = true;
      padded[x] = all ? 2 : some;
    }
    if (lowest) {
      lowest[x] = INT32_MAX, highest[x] = INT32_MIN;
      for (long n = from; n < to; ++n) {
        const int32_t id = c.kv_segments[n];
        if (id < lowest[x]) lowest[x] = id;
        if (id > highest[x]) highest[x] = id;
      }
    }
  }
};

// What every key block needs before the products: its operands packed for the kv heads that reference it, and the masks' summary.
template <class V>
class Preparation {
 public:
  Preparation(const bsa_call& c, KeyBlocks& info, std::initializer_list<Operand<V>*> operands) : c_(c), info_(info) {
    for (Operand<V>* o : operands)
      if (o && o->packed()) operands_[count_++] = o;
    // Rows of neighbouring heads lie side by side: whoever takes several reads whole pages.
    if (c.batch * c.kv_blocks >= 8 * c.num_threads) heads_ = c.kv_heads < kHeads ? c.kv_heads : kHeads;
    groups_ = (c.kv_heads + heads_ - 1) / heads_;
  }
  long items() const { return count_ || info_.padded || info_.lowest ? c_.batch * groups_ * c_.kv_blocks : 0; }
  void item(long x) {
    const long j = x % c_.kv_blocks, group = x / c_.kv_blocks % groups_, b = x / c_.kv_blocks / groups_;
    const Layout layout(c_);
    if (group == 0) info_.fill(c_, b, j);
    long heads[kHeads], used = 0;
    for (long h = group * heads_; h < group * heads_ + heads_ && h < c_.kv_heads; ++h)
      if (count_ && layout.referenced(b, h, j)) heads[used++] = h;
    const long size = layout.kv_size(j);
    for (int o = 0; o < count_; ++o) {
      const long step = operands_[o]->step();
      for (long offset = 0; offset < size; offset += step)
        for (long y = 0; y < used; ++y)
          operands_[o]->pack(b, heads[y], j, offset, size - offset < step ? size - offset : step);
    }
  }

 private:
  static constexpr long kHeads = 16;
  const bsa_call& c_;
  KeyBlocks& info_;
  Operand<V>* operands_[3];
  int count_ = 0;
  long heads_ = 1, groups_;
};

// Up to 2 W queries of one (batch, head), one per lane.
template <class V>
struct Queries {
  long b, h, token, count, position;
  int vectors;
  int32_t segments[2 * V::W];
  int32_t lowest, highest;
  long lanes() const { return vectors * V::W; }
  void set(const bsa_call& c, long batch, long head, long block, long first, long n) {
    b = batch, h = head, token = first, count = n;
    position = c.q_start[block] + (first - c.q_bounds[block]);
    vectors = n > V::W ? 2 : 1;
    if (!c.q_segments) return;
    lowest = INT32_MAX, highest = INT32_MIN;
    for (long l = 0; l < lanes(); ++l) {
      const int32_t id = c.q_segments[b * c.q_len + token + (l < count ? l : 0)];
      segments[l] = id;
      if (id < lowest) lowest = id;
      if (id > highest) highest = id;
    }
  }
};

// Keys [offset, offset + count) of the key block of a slot, within reach of some query of a tile.
struct Keys {
  long slot, block, offset, count;
};

// Calls f(keys) for every piece of at most kKeys keys of slot s, in order.
template <class F>
BSA_INLINE void each_piece(const bsa_call& c, long s, const F& f) {
  const long j = c.indices[s], size = c.kv_bounds[j + 1] - c.kv_bounds[j];
  for (long offset = 0; offset < size; offset += kKeys) f(Keys{s, j, offset, size - offset < kKeys ? size - offset : kKeys});
}

inline float bias_of(const bsa_call& c, long b, long h, long slot) {
  return c.block_bias ? c.block_bias[b * c.bias_batch + h * c.bias_head + c.entries[slot]] : 0.f;
}

// Cuts `keys` down to what the band leaves for some query; false when nothing is left. Pairs and tiles stay whole.
template <class V>
BSA_INLINE bool clip(const bsa_call& c, const KeyBlocks& info, const Queries<V>& q, Keys& keys, TileMask& mask) {
  const long x = q.b * c.kv_blocks + keys.block;
  const bool segments = info.lowest && !(info.lowest[x] == info.highest[x] && q.lowest == q.highest && q.lowest == info.lowest[x]);
  if (segments && (info.highest[x] < q.lowest || q.highest < info.lowest[x])) return false;
  if (info.padded && info.padded[x] == 2) return false;
  const long start = c.kv_start[keys.block], last = q.position + q.count - 1;
  long from = q.position + c.band_lo - start, to = last + c.band_hi + 1 - start;
  if (from < keys.offset) from = keys.offset;
  if (to > keys.offset + keys.count) to = keys.offset + keys.count;
  if (from >= to) return false;
  from -= (from - keys.offset) % kKeyStep<V>;
  if (V::TILES && to < keys.offset + keys.count) {  // whole tiles; the mask takes what is too much
    to = keys.offset + round_up(to - keys.offset, 16);
    if (to > keys.offset + keys.count) to = keys.offset + keys.count;
  }
  keys.offset = from;
  keys.count = to - from;
  mask.key0 = start + from;
  mask.query0 = q.position;
  mask.band_lo = c.band_lo;
  mask.band_hi = c.band_hi;
  mask.band = start + to - 1 > q.position + c.band_hi || start + from < last + c.band_lo;
  const long token = q.b * c.kv_len + c.kv_bounds[keys.block] + from;
  mask.padding = info.padded && info.padded[x] ? c.key_padding + token : nullptr;
  mask.key_segment = segments ? c.kv_segments + token : nullptr;
  mask.query_segment = q.segments;
  mask.bias = nullptr;
  if (c.attn_bias) {
    const long first = q.b * c.attn_bias_batch + q.h * c.attn_bias_head + q.token * c.attn_bias_query +
                       (c.kv_bounds[keys.block] + from) * c.attn_bias_key;
    mask.bias = static_cast<const char*>(c.attn_bias) + first * (c.attn_bias_bool ? 1 : 4);
    mask.bias_is_bool = c.attn_bias_bool != 0;
    mask.bias_query = c.attn_bias_query, mask.bias_key = c.attn_bias_key;
    mask.queries = q.count;
  }
  return true;
}

}  // namespace
