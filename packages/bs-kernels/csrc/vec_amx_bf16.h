// AMX with bf16 tiles beside AVX-512 vectors. Only csrc/isa_amx_bf16.cpp may include this: no other code may hold tile
// instructions.
#pragma once
#include "amx.h"
#include "vec_avx512_bf16.h"

namespace {

// Plain assembly rather than intrinsics: gcc 12's declare no memory effects of tile loads and stores, and too few bytes of the
// configuration, so the compiler may move or drop the code that writes what a tile reads.
struct AmxBf16 : Avx512Bf16 {
  static constexpr bool TILES = true;
  static void configure() {
    const TileConfig config;
    asm volatile("ldtilecfg %0" : : "m"(config) : "memory");
  }
  static void release() { asm volatile("tilerelease" : : : "memory"); }
  template <int T>
  static BSA_INLINE void zero() {
    asm volatile("tilezero %%tmm%c0" : : "i"(T) : "memory");
  }
  template <int T>
  static BSA_INLINE void load(const void* p, long stride) {
    asm volatile("tileloadd (%0,%1,1), %%tmm%c2" : : "r"(p), "r"(stride), "i"(T) : "memory");
  }
  template <int T>
  static BSA_INLINE void store(void* p, long stride) {
    asm volatile("tilestored %%tmm%c2, (%0,%1,1)" : : "r"(p), "r"(stride), "i"(T) : "memory");
  }
  template <int C, int A, int B>
  static BSA_INLINE void dot() {
    asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(C), "i"(A), "i"(B) : "memory");
  }
  // The vectors' own.
  using Avx512Bf16::dot;
  using Avx512Bf16::load;
  using Avx512Bf16::store;
};

}  // namespace
