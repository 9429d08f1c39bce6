// May this process use tiles? Asks the processor, the operating system's context switch and, once, the kernel's permission.
// Nothing here executes a tile instruction.
#pragma once
#if defined(__x86_64__) && defined(__linux__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>

namespace {

// Null, or why not.
inline const char* tiles_refused() {
  unsigned a, b, c, d;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || !(d >> 24 & 1) || !(d >> 22 & 1)) return "this processor does not have it";
  // Palette 1 as the engine configures it: 8 tiles of 16 rows of 64 bytes.
  if (!__get_cpuid_count(0x1d, 1, &a, &b, &c, &d) || b >> 16 != 8 || (b & 0xffff) != 64 || (c & 0xffff) != 16)
    return "this processor's tiles have another shape";
  if (!__get_cpuid(1, &a, &b, &c, &d) || !(c >> 27 & 1)) return "the operating system does not save extended state";
  unsigned enabled, high;
  asm volatile("xgetbv" : "=a"(enabled), "=d"(high) : "c"(0));
  constexpr unsigned kTileState = 3u << 17;  // configuration and data
  if ((enabled & kTileState) != kTileState) return "the operating system does not save tiles";
  // Linux 5.16 and later hand out tile data on request, for all threads of the process.
  constexpr long kGetPermission = 0x1022, kRequestPermission = 0x1023, kTileData = 18;
  unsigned long granted = 0;
  if (syscall(SYS_arch_prctl, kRequestPermission, kTileData) != 0) return "the kernel refuses tiles to this process";
  if (syscall(SYS_arch_prctl, kGetPermission, &granted) != 0 || !(granted >> kTileData & 1))
    return "the kernel does not confirm its permission for tiles";
  return nullptr;
}

}  // namespace
#else
namespace {
inline const char* tiles_refused() { return "tiles are used on Linux on x86-64 only"; }
}  // namespace
#endif
