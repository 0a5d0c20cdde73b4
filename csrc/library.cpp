// What concerns the library as a whole.
#include "parallel.h"

#if defined(__linux__)
#include <sys/mman.h>
#endif

extern "C" {

int rmx_abi(void) { return RMX_ABI; }

const char* rmx_isa(void) {
#if RMX_HAS_CLONES
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq"))
        return "x86-64-v4";
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2"))
        return "x86-64-v3";
#endif
    return "baseline";
}

void rmx_use_huge_pages(void* data, int64_t bytes) {
#if defined(MADV_HUGEPAGE)
    const uintptr_t page = uintptr_t(2) << 20, at = reinterpret_cast<uintptr_t>(data);
    const uintptr_t begin = (at + page - 1) / page * page, end = (at + static_cast<uintptr_t>(bytes)) / page * page;
    if (begin < end) (void)madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);  // advice: may fail
#else
    (void)data, (void)bytes;
#endif
}
}
