// Executes the tile instructions of compiled code on a processor that lacks them: each one traps, is decoded from its bytes and
// carried out on emulated tiles. So the object code of the AMX engine itself is tested, its registers, addresses and order included.
// For the driver alone; the core never handles signals.
#pragma once
#if defined(__x86_64__) && defined(__linux__)
#include <signal.h>
#include <ucontext.h>

#include "../emulated_tiles.h"

namespace {

class TrappedTiles {
 public:
  static void install() {
    struct sigaction action {};
    action.sa_sigaction = handle;
    action.sa_flags = SA_SIGINFO;
    sigaction(SIGILL, &action, nullptr);
  }
  static long executed() { return __atomic_load_n(&count_, __ATOMIC_RELAXED); }

 private:
  // All are VEX-encoded in map 0F38: C4, two bytes of prefix, opcode, ModRM and, for memory, SIB and displacement.
  static void handle(int, siginfo_t*, void* context) {
    greg_t* g = static_cast<ucontext_t*>(context)->uc_mcontext.gregs;
    const uint8_t* x = reinterpret_cast<const uint8_t*>(g[REG_RIP]);
    if (x[0] != 0xc4 || (x[1] & 0x1f) != 2) fail(x);
    const int prefix = x[2] & 3, vvvv = ~x[2] >> 3 & 15, mod = x[4] >> 6, reg = x[4] >> 3 & 7, rm = x[4] & 7;
    long length = 5;
    if (x[3] == 0x49 && mod != 3 && prefix == 0) {
      configure(address(g, x, length, nullptr));
    } else if (x[3] == 0x49 && x[4] == 0xc0 && prefix == 0) {
      EmulatedTiles::release();
    } else if (x[3] == 0x49 && mod == 3 && rm == 0 && prefix == 3) {
      each(reg, [](auto t) { EmulatedTiles::zero<t.value>(); });
    } else if (x[3] == 0x4b && mod != 3 && rm == 4 && (prefix == 3 || prefix == 2)) {
      long stride = 0;
      char* p = address(g, x, length, &stride);
      if (prefix == 3)
        each(reg, [&](auto t) { EmulatedTiles::load<t.value>(p, stride); });
      else
        each(reg, [&](auto t) { EmulatedTiles::store<t.value>(p, stride); });
    } else if (x[3] == 0x5c && mod == 3 && prefix == 2) {
      EmulatedTiles::dot(reg, rm, vvvv);
    } else {
      fail(x);
    }
    g[REG_RIP] += length;
    __atomic_fetch_add(&count_, 1, __ATOMIC_RELAXED);
  }

  static void configure(const char* p) {
    const TileConfig expected;
    EmulatedTiles::require(std::memcmp(p, &expected, 64) == 0, "another configuration than eight full tiles");
    EmulatedTiles::configure();
  }

  // base + index * scale + displacement; `stride` receives index * scale instead, as tile loads and stores take it.
  static char* address(const greg_t* g, const uint8_t* x, long& length, long* stride) {
    static const int order[16] = {REG_RAX, REG_RCX, REG_RDX, REG_RBX, REG_RSP, REG_RBP, REG_RSI, REG_RDI,
                                  REG_R8,  REG_R9,  REG_R10, REG_R11, REG_R12, REG_R13, REG_R14, REG_R15};
    const int mod = x[4] >> 6, rm = x[4] & 7, extend_index = x[1] & 0x40 ? 0 : 8, extend_base = x[1] & 0x20 ? 0 : 8;
    int base = rm | extend_base;
    long offset = 0;
    const uint8_t* displacement = x + 5;
    if (rm == 4) {
      const int index = (x[5] >> 3 & 7) | extend_index;
      base = (x[5] & 7) | extend_base;
      if ((x[5] & 7) == 5 && mod == 0) fail(x);
      if (index != 4) offset = long(g[order[index]]) << (x[5] >> 6);
      ++displacement, ++length;
    } else if (mod == 0 && rm == 5) {  // relative to the next instruction
      int32_t relative;
      std::memcpy(&relative, displacement, 4);
      length += 4;
      return reinterpret_cast<char*>(g[REG_RIP]) + length + relative;
    }
    long shift = 0;
    if (mod == 1) shift = int8_t(*displacement), length += 1;
    if (mod == 2) {
      int32_t wide;
      std::memcpy(&wide, displacement, 4);
      shift = wide, length += 4;
    }
    if (stride) *stride = offset, offset = 0;
    return reinterpret_cast<char*>(g[order[base]]) + offset + shift;
  }

  template <int T>
  struct Number {
    static constexpr int value = T;
  };
  template <class F>
  static void each(int tile, const F& f) {
    switch (tile) {
      case 0: return f(Number<0>());
      case 1: return f(Number<1>());
      case 2: return f(Number<2>());
      case 3: return f(Number<3>());
      case 4: return f(Number<4>());
      case 5: return f(Number<5>());
      case 6: return f(Number<6>());
      default: return f(Number<7>());
    }
  }

  [[noreturn]] static void fail(const uint8_t* x) {
    std::fprintf(stderr, "not a tile instruction: %02x %02x %02x %02x %02x %02x\n", x[0], x[1], x[2], x[3], x[4], x[5]);
    std::abort();
  }
  static inline long count_ = 0;
};

}  // namespace
#endif
