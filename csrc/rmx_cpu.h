// The C ABI of the native CPU kernels: the whole of it. No torch, no exceptions, no allocation, no global state.
//
// Dimensions: N rows, V vocabulary, K top-k. All logarithms are natural. Row results depend on the row alone: not on N,
// on the number of threads, or on the instruction set. A row with a NaN, a +inf, or nothing but -inf comes out as NaN.
#ifndef RMX_CPU_H
#define RMX_CPU_H

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define RMX_API __attribute__((visibility("default")))
#define RMX_ABI 7  // raised with every change of this file; the Python side refuses a library of another number

// Types of logits. Statistics are double for RMX_F64 and float for the others: "real" below.
enum { RMX_F32 = 0, RMX_BF16 = 1, RMX_F16 = 2, RMX_F64 = 3 };

enum { RMX_OK = 0, RMX_BAD_DTYPE = 1, RMX_BAD_POOL = 2, RMX_BAD_SHAPE = 3 };  // returned by the kernels

// func(begin, end, context) over disjoint ranges that cover [begin, end). libtorch's torch_parallel_for; NULL: serial.
typedef void (*rmx_range_func)(int64_t begin, int64_t end, void* context);
typedef int32_t (*rmx_parallel_for)(int64_t begin, int64_t end, int64_t grain, rmx_range_func func, void* context);

// z = cap(x) / temperature with cap(u) = softcap * tanh(u / softcap); softcap = 0 stands for none. Where row_temperature is
// given, row i of a call has row_temperature[i] in the place of `temperature`, in the student as in the base.
typedef struct {
    double temperature, softcap;
    const void* row_temperature;  // real [N], or NULL
} rmx_scale;

// Rows of logits, or of gradients: element j of row i is at data[(rows ? rows[i] : i) * stride + j].
typedef struct {
    void* data;
    int64_t stride;
    const int64_t* rows;
    int32_t dtype;
} rmx_rows;

// A candidate of the top-k: a heap of K a row while tiles are folded.
typedef struct {
    double value;
    int64_t id;
} rmx_entry;

// m = max z, d = sum exp(z - m), T = sum exp(z - m) (z - m) of each row, its z[target], and its K largest z. Written
// anew by the tile with first = 0, brought up to date by the later ones; tiles come in the order of the columns.
typedef struct {
    void *m, *d, *T;        // real [N]
    void* chosen;           // real [N], or NULL without targets
    const int64_t* target;  // [N], or NULL
    int64_t K;
    rmx_entry* best;  // [N, K]
} rmx_sums;

// Fold columns [first, first + columns) of the logits of N rows into the sums. x points at column `first`.
RMX_API int rmx_entropy_topk(const rmx_rows* x, const rmx_scale* scale, int64_t N, int64_t first, int64_t columns,
                     const rmx_sums* sums, rmx_parallel_for pool);

// After the last tile. m becomes NaN in rows without a distribution; log_d = log d; lse = m + log d;
// entropy = log d - T / d; logprob = (chosen - m) - log d; top-k as log-probs and ids, ties to the lower id.
typedef struct {
    void *log_d, *lse, *entropy, *logprob;  // real [N]; logprob NULL without targets
    void* topk_logprobs;                    // real [N, K]
    int64_t* topk_ids;                      // [N, K]
} rmx_stats;
RMX_API int rmx_entropy_topk_finish(int32_t dtype, int64_t N, const rmx_sums* sums, const rmx_stats* stats,
                            rmx_parallel_for pool);

// dx of a tile, in place if dx is x: with p = exp(z - m - log d),
//   dz = along_p p - g_entropy p (log p + entropy) + g_logprob onehot(target) + sum_k g_topk onehot(topk_ids).
typedef struct {
    const void *m, *log_d, *entropy;         // real [N]
    const int64_t *target, *topk_ids;        // [N], [N, K]
    const void *along_p;                     // real [N]: g_lse - g_logprob - sum g_topk
    const void *g_entropy, *g_logprob, *g_topk;  // real [N], [N], [N, K]; each NULL where there is none
    int64_t K;
} rmx_stats_gradient;
RMX_API int rmx_entropy_topk_backward(const rmx_rows* x, const rmx_scale* scale, int64_t N, int64_t first, int64_t columns,
                              const rmx_stats_gradient* gradient, const rmx_rows* dx, rmx_parallel_for pool);

// The row terms of the gated contrastive loss, and the gradient that belongs to them. Rows are whole: V columns.
// Rows i < anchored have a base, row i of `base`; the others have none, and their kl is left alone.
//   logprob = z_s[target] - lse_s      kl = sum p_b (e^delta - 1 - delta), delta = log p_s - log p_b
//   dz_s = ce p_s + kl_weight (p_s - p_b) - ce onehot(target), times upstream
// Where sum p_b is off 1 by more than mass_tolerance, base_m and base_log_d belong to other logits: kl is NaN, and so
// are the gradient and base_m.
typedef struct {
    const int64_t* target;        // [N]
    const void *ce, *kl_weight;   // real [N]; NULL where no gradient is asked for
    void *m, *log_d;              // real [N], the student's normalisers
    void *base_m, *base_log_d;    // real [N], the base's
    void *logprob, *kl;           // real [N]; kl is written in rows with a base
    double upstream, mass_tolerance;
    int32_t find_base_norm;       // compute base_m and base_log_d; else they are inputs
} rmx_loss;
RMX_API int rmx_gated_contrastive_loss(const rmx_rows* student, const rmx_rows* base, int64_t anchored, const rmx_scale* scale,
                               int64_t N, int64_t V, const rmx_loss* loss, const rmx_rows* dx, rmx_parallel_for pool);

// The gradient alone, for a tile: columns [first, first + columns), normalisers known.
RMX_API int rmx_gated_contrastive_loss_backward(const rmx_rows* student, const rmx_rows* base, int64_t anchored,
                                        const rmx_scale* scale, int64_t N, int64_t first, int64_t columns,
                                        const rmx_loss* loss, const rmx_rows* dx, rmx_parallel_for pool);

// The divergence of student rows q from teacher rows p, and its gradient. `kind`: KL(p || q), KL(q || p),
// JSD = beta KL(p || m) + (1 - beta) KL(q || m) with m = beta p + (1 - beta) q, or the alpha divergence
// (1 - sum p^beta q^(1 - beta)) / (beta (1 - beta)), 0 < beta < 1.
// norms: m and log d of the student, then of the teacher; the mean that the gradient of the last three kinds needs; the
// student's entropy. With `value` rows are whole, and norms and value are written; without it norms are read. With dx,
//   dz = g_divergence d divergence / dz + g_entropy d entropy / dz of the student, in place if dx is the student.
// Logits of both have dtypes of one precision. Where the student is impossible KL(p || q) is inf, as KL(q || p) is where the teacher is.
enum { RMX_FORWARD_KL = 0, RMX_REVERSE_KL = 1, RMX_JSD = 2, RMX_ALPHA = 3 };
typedef struct {
    void* norms;                             // real [6, norm_stride]
    void* value;                             // real [N], or NULL
    const void *g_divergence, *g_entropy;    // real [N], each NULL where it is zero
    int64_t norm_stride;
    double beta;
    int32_t kind;
} rmx_divergence_rows;
RMX_API int rmx_divergence(const rmx_rows* student, const rmx_rows* teacher, const rmx_scale* scale,
                           const rmx_scale* teacher_scale, int64_t N, int64_t columns, const rmx_divergence_rows* rows,
                           const rmx_rows* dx, rmx_parallel_for pool);

// Attention of one new token a sequence, B sequences, Hk heads of keys with G heads of queries each, L keys of width D, all
// in float: out[b, h, g] = sum_l p_l v[b, h, l], p = softmax_l(scale q[b, h, g] . k[b, h, l] + bias[b, l]).
// D is a multiple of 16 and G at most 64, else RMX_BAD_SHAPE. Key l of a head is at k[b * k_batch + h * k_head + l * D].
typedef struct {
    const void *q, *k, *v;                     // [B, Hk, G, D], contiguous; [B, Hk, L, D], strided
    const void* bias;                          // [B, L], or NULL
    void *scores, *out;                        // [B, Hk, G, L], scratch; [B, Hk, G, D]
    int64_t k_batch, k_head, v_batch, v_head;  // strides
    int64_t B, Hk, G, L, D;
    double scale;
} rmx_attention;
RMX_API int rmx_decode_attention(const rmx_attention* attention, rmx_parallel_for pool);

// Causal attention inside each of N sequences end to end, sequence n being the tokens ends[n] .. ends[n + 1] - 1, at most
// `longest` of them; all in float. Token i of a sequence sees itself and the window - 1 tokens before it:
//   out[i, h] = sum_j p_j v[j, h / G], p = softmax_j(scale q[i, h] . k[j, h / G]).
// norms: the largest score of a row, and 1 / sum_j exp(score_j - it). With g, the gradient of out, they and out are read,
// and dq, dk and dv written. D is a multiple of 16, else RMX_BAD_SHAPE; its elements lie side by side. The work goes to
// `slots` threads. scratch: slots * (D + 4) * width floats, with g slots * 2 * (D + 64) * width, where width is the least
// multiple of 16 not below `longest`.
typedef struct {
    const float *q, *k, *v, *g;             // [T, Hk G, D], [T, Hk, D] twice, all strided; [T, Hk G, D], contiguous
    float *out, *norms, *dq, *dk, *dv, *scratch;  // [T, Hk G, D]; [T, Hk G, 2]; as q, k and v, contiguous
    const int64_t* ends;                    // [N + 1]
    int64_t q_token, q_head, k_token, k_head, v_token, v_head;  // strides
    int64_t N, Hk, G, D, longest, window, slots;
    double scale;
} rmx_packed;
RMX_API int rmx_packed_attention(const rmx_packed* packed, rmx_parallel_for pool);

// N rows of width H, contiguous: y = x rstd (weight + offset), rstd = 1 / sqrt(mean x^2 + eps), x rstd being rounded to the
// dtype before the weight where `rounded` is not 0. With g, y is the gradient with respect to x instead, and rstd is read.
typedef struct {
    const void *x, *weight, *g;
    void *y, *rstd;  // rstd: real [N]
    int64_t N, H;
    double eps, offset;
    int32_t dtype, rounded;
} rmx_norm;
RMX_API int rmx_rms_norm(const rmx_norm* norm, rmx_parallel_for pool);

// y = act(gate) up of `size` elements, act being SiLU, or GELU with tanh. With g, y and d_up are the gradients with
// respect to gate and up.
typedef struct {
    const void *gate, *up, *g;
    void *y, *d_up;
    int64_t size;
    int32_t dtype, gelu;
} rmx_gated;
RMX_API int rmx_gated_activation(const rmx_gated* gated, rmx_parallel_for pool);

// (x1 cos1 - x2 sin1, x2 cos2 + x1 sin2) of the halves of heads of width 2 half, or that map transposed (`inverse`). x and y
// [B, heads, T, 2 half], strided but for the last dimension; cos and sin [T, 2 half] of batch b at b * table_batch.
typedef struct {
    const void *x, *cos, *sin;
    void* y;
    int64_t x_batch, x_head, x_token, y_batch, y_head, y_token, table_batch, B, T, heads, half;
    int32_t dtype, inverse;
} rmx_rotation;
RMX_API int rmx_rotate(const rmx_rotation* rotation, rmx_parallel_for pool);

// Ask for 2 MiB pages under a large scratch buffer that was not touched yet (Linux): 48 MiB of small ones cost 14 ms.
RMX_API void rmx_use_huge_pages(void* data, int64_t bytes);

RMX_API int rmx_abi(void);
RMX_API const char* rmx_isa(void);  // the instruction set that this machine runs: "x86-64-v4", "x86-64-v3" or "baseline"

#ifdef __cplusplus
}
#endif
#endif
