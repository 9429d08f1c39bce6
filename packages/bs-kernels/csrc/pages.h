// Which (batch, key block) pairs read each page of paged keys and values: whoever writes a page's gradient owns all of them.
#pragma once
#include "problem.h"

namespace {

struct PageReaders {
  int32_t *begin = nullptr;    // [pages + 1], into `items`
  int32_t *items = nullptr;    // batch * kv_blocks + block, ascending for every page
  int32_t *used = nullptr;     // pages with a reader
  long count = 0;              // of those
  bool shared = false;         // some page has several readers

  static long bytes(const bsa_call& c) {
    const long pairs = c.batch * c.kv_blocks;
    return c.page_table ? round_up((c.pages + 1) * 4, 64) + 2 * round_up(pairs * 4, 64) : 0;
  }
  void take(const bsa_call& c, Arena& arena) {
    if (!c.page_table) return;
    begin = arena.take<int32_t>(c.pages + 1);
    items = arena.take<int32_t>(c.batch * c.kv_blocks);
    used = arena.take<int32_t>(c.batch * c.kv_blocks);
  }
  // The table holds anything where a block is not active.
  void build(const bsa_call& c) {
    if (!c.page_table) return;
    const Layout layout(c);
    const long pairs = c.batch * c.kv_blocks;
    auto active = [&](long x) {
      for (long h = 0; h < c.kv_heads; ++h)
        if (layout.referenced(x / c.kv_blocks, h, x % c.kv_blocks)) return true;
      return false;
    };
    std::memset(begin, 0, size_t(c.pages + 1) * 4);
    for (long x = 0; x < pairs; ++x)
      if (active(x) && begin[c.page_table[x]]++ == 0) used[count++] = c.page_table[x];
    int32_t sum = 0;
    for (long page = 0; page <= c.pages; ++page) {
      const int32_t readers = page < c.pages ? begin[page] : 0;
      shared |= readers > 1;
      begin[page] = sum, sum += readers;
    }
    for (long x = 0; x < pairs; ++x)
      if (active(x)) items[begin[c.page_table[x]]++] = int32_t(x);  // leaves every begin at its page's end
    for (long page = c.pages; page > 0; --page) begin[page] = begin[page - 1];
    begin[0] = 0;
  }
};

}  // namespace
