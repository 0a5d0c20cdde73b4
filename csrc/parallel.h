// How a row function reaches all rows: one clone an instruction set, one range of rows a thread.
#ifndef RMX_PARALLEL_H
#define RMX_PARALLEL_H

#include "rmx_cpu.h"

// The loader picks the clone by the CPU. Elsewhere (arm64, macOS, musl) the compiler's target is all there is.
#if defined(__x86_64__) && defined(__GLIBC__) && !defined(RMX_NO_CLONES)
#define RMX_CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#define RMX_HAS_CLONES 1
#else
#define RMX_CLONES
#define RMX_HAS_CLONES 0
#endif

namespace rmx {

constexpr int64_t WORK = 32768;  // elements below which another thread costs more than it saves

// row_range(arguments, begin, end) for all N rows.
template <class Arguments>
int for_rows(rmx_parallel_for pool, int64_t N, int64_t columns, void (*row_range)(const Arguments&, int64_t, int64_t),
             const Arguments& arguments) noexcept {
    if (N <= 0) return RMX_OK;
    const int64_t grain = columns >= WORK ? 1 : WORK / (columns > 0 ? columns : 1);
    if (pool == nullptr || N <= grain) {
        row_range(arguments, 0, N);
        return RMX_OK;
    }
    struct Context {
        void (*row_range)(const Arguments&, int64_t, int64_t);
        const Arguments* arguments;
    } context{row_range, &arguments};
    const rmx_range_func call = [](int64_t begin, int64_t end, void* c) {
        const auto* own = static_cast<const Context*>(c);
        own->row_range(*own->arguments, begin, end);
    };
    return pool(0, N, grain, call, &context) == 0 ? RMX_OK : RMX_BAD_POOL;
}

}  // namespace rmx
#endif
