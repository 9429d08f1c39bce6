// Fresh memory in large pages: a result of megabytes otherwise costs a page fault per 4 KB, which at low density is as much as the
// arithmetic. Only advice: it does nothing to pages that are there already, and a kernel may ignore it.
#pragma once
#include <cstdint>

#include "call.h"
#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace {

inline void prefer_huge_pages(const void* data, int64_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t kPage = uintptr_t(1) << 21;
  if (!data || bytes < int64_t(kPage)) return;
  const uintptr_t from = (reinterpret_cast<uintptr_t>(data) + kPage - 1) & ~(kPage - 1);
  const uintptr_t to = (reinterpret_cast<uintptr_t>(data) + uintptr_t(bytes)) & ~(kPage - 1);
  if (from < to) madvise(reinterpret_cast<void*>(from), to - from, MADV_HUGEPAGE);
#else
  (void)data, (void)bytes;
#endif
}

// From the first element of a tensor to its last, where its rows leave no gaps.
inline void prefer_huge_pages(const bsa_tensor& t, int dtype, int64_t batch, int64_t tokens, int64_t heads, int64_t dim) {
  if (t.head != dim || t.token != heads * dim || (batch > 1 && t.batch != tokens * heads * dim)) return;
  prefer_huge_pages(t.data, batch * tokens * heads * dim * (dtype == BSA_F32 ? 4 : 2));
}

}  // namespace
