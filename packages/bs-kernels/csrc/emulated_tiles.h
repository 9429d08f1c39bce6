// The tile registers of AMX in plain C++, instruction by instruction as the architecture defines them, so that the tile engine is
// tested on machines without them. What the processor would answer with a fault ends the program with a message.
#pragma once
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "amx.h"

namespace {

struct EmulatedTiles {
  struct Tile {
    alignas(64) char row[16][64];
  };
  struct State {
    bool configured = false;
    TileConfig config;
    Tile tile[8];
  };
  static State& state() {
    static thread_local State s;
    return s;
  }
  static void require(bool fine, const char* what) {
    if (fine) return;
    std::fprintf(stderr, "emulated tiles: %s\n", what);
    std::abort();
  }
  static void configure() {
    State& s = state();
    require(!s.configured, "configured twice");
    s.config = TileConfig();
    bool plain = s.config.palette == 1 && s.config.start_row == 0;
    for (uint8_t x : s.config.reserved) plain = plain && x == 0;
    for (int t = 0; t < 16; ++t) plain = plain && s.config.rows[t] <= (t < 8 ? 16 : 0) && s.config.row_bytes[t] <= (t < 8 ? 64 : 0);
    require(plain, "a configuration that faults");
    std::memset(s.tile, 0, sizeof s.tile);
    s.configured = true;
  }
  static void release() {
    require(state().configured, "released without a configuration");
    state().configured = false;
    std::memset(state().tile, 0xff, sizeof state().tile);
  }
  static State& running() {
    require(state().configured, "used without a configuration");
    return state();
  }

  template <int T>
  static void zero() {
    std::memset(&running().tile[T], 0, sizeof(Tile));
  }
  template <int T>
  static void load(const void* p, long stride) {
    State& s = running();
    std::memset(&s.tile[T], 0, sizeof(Tile));
    for (long r = 0; r < s.config.rows[T]; ++r)
      std::memcpy(s.tile[T].row[r], static_cast<const char*>(p) + r * stride, s.config.row_bytes[T]);
  }
  template <int T>
  static void store(void* p, long stride) {
    State& s = running();
    for (long r = 0; r < s.config.rows[T]; ++r)
      std::memcpy(static_cast<char*>(p) + r * stride, s.tile[T].row[r], s.config.row_bytes[T]);
  }
  template <int C, int A, int B>
  static void dot() {
    dot(C, A, B);
  }
  static void dot(int c, int a, int b) {
    State& s = running();
    const TileConfig& k = s.config;
    require(c != a && a != b && c != b, "operands that coincide");
    require(k.rows[c] == k.rows[a] && k.row_bytes[c] == k.row_bytes[b] && k.row_bytes[a] == 4 * k.rows[b], "shapes that fault");
    multiply(s.tile[c], s.tile[a], s.tile[b], k.rows[c], k.rows[b], k.row_bytes[b] / 2);
  }

 private:
  static float flush(float x) { return std::fabs(x) < 0x1p-126f ? std::copysign(0.f, x) : x; }
  // A product of two bf16 is exact in f32 unless it over- or underflows, and then a plain sum rounds as the fused one does.
  static bool plain(float x) { return x == 0.f || (std::fabs(x) >= 0x1p-40f && std::fabs(x) < 0x1p60f); }

  // Even and odd elements of the pairs have sums of their own, each of fused multiply-adds in order; then C += even + odd. To
  // nearest, denormals are zero on the way in and out.
  static void multiply(Tile& c, const Tile& a, const Tile& b, int rows, int depth, int columns) {
    float wide[16][32];
    bool simple = true;
    for (int k = 0; k < depth; ++k)
      for (int n = 0; n < columns; ++n) simple &= plain(wide[k][n] = element(b, k, n));
    for (int m = 0; m < rows; ++m) {
      float sum[32] = {}, pair[32];
      bool easy = simple;
      for (int k = 0; k < 2 * depth; ++k) easy &= plain(pair[k] = element(a, m, k));
      for (int k = 0; k < depth; ++k)
        if (easy)
          for (int n = 0; n < 32; ++n) sum[n] += pair[2 * k + n % 2] * wide[k][n];
        else
          for (int n = 0; n < columns; ++n) sum[n] = flush(std::fma(pair[2 * k + n % 2], wide[k][n], sum[n]));
      for (int n = 0; n < columns / 2; ++n) {
        float x;
        std::memcpy(&x, c.row[m] + 4 * n, 4);
        x = flush(flush(x) + flush(sum[2 * n] + sum[2 * n + 1]));
#if defined(BSA_FAULTY_TILES)  // for the test of the self-test
        if (m == 13 && n == 2) x += 1.f;
#endif
        std::memcpy(c.row[m] + 4 * n, &x, 4);
      }
    }
  }
  static float element(const Tile& t, int row, int n) {
    uint16_t h;
    std::memcpy(&h, t.row[row] + 2 * n, 2);
    const uint32_t bits = uint32_t(h) << 16;
    float x;
    std::memcpy(&x, &bits, 4);
    return flush(x);
  }
};

}  // namespace
