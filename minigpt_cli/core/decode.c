/* One token more for each of B streams on a CPU: what GPT.forward does with a cache and one new token, as one call.

   Decoding is reading every weight once a token; operator by operator, calling takes longer than reading. This is the
   model of model.py and layers.py again, and tests hold the two together for every option that a config has. Weights
   and cache are of type `real`, bf16 or float32; everything else is float32. Threads share the rows of each matrix, and
   wait for one another after it; what comes out does not depend on how many they are.

   Shapes: B streams, C width, H heads of queries, G of keys and values, D width of a head, S slots of the cache, F width
   of the feed-forward, V vocabulary. A matrix is (out, in), as nn.Linear has it. */

#include <math.h>
#include <stdint.h>
#include <string.h>
#ifdef __AVX512F__
#include <immintrin.h>
#endif
#ifdef _OPENMP
#include <omp.h>
#else
#define omp_get_thread_num() 0
#endif

#ifdef __AVX512F__
enum { LANES = 16 };
#elif defined __AVX__
enum { LANES = 8 };
#else
enum { LANES = 4 };
#endif
enum { ROWS = 4, STREAMS = 4 }; /* of a product, computed together: each number that is read serves several sums */

typedef float lanes __attribute__((vector_size(4 * LANES)));
typedef uint32_t lanes_32 __attribute__((vector_size(4 * LANES)));
typedef uint16_t lanes_16 __attribute__((vector_size(2 * LANES)));

static inline lanes load(const float *p) {
    lanes x;
    memcpy(&x, p, sizeof x);
    return x;
}

#ifdef BF16 /* the upper half of a float32 */
typedef uint16_t real;

static inline float wide(real x) {
    uint32_t bits = (uint32_t)x << 16;
    float y;
    memcpy(&y, &bits, sizeof y);
    return y;
}

static inline lanes load_wide(const real *p) {
#ifdef __AVX512F__
    return (lanes)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)p)), 16);
#else
    lanes_16 x;
    memcpy(&x, p, sizeof x);
    return (lanes)(__builtin_convertvector(x, lanes_32) << 16);
#endif
}

static inline real narrow(float x) { /* to the nearest, and of two to the even one */
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    return x != x ? 0x7fc0 : (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}
#else
typedef float real;

static inline float wide(real x) { return x; }
static inline lanes load_wide(const real *p) { return load(p); }
static inline real narrow(float x) { return x; }
#endif

/* native.py has the same structures. A pointer is 0 where the model has no such thing. */
typedef struct { const real *weight, *bias; } Affine; /* a linear, or a norm */
typedef struct { Affine norm_attn, qkv, norm_q, norm_k, proj, norm_mlp, up, down; } Block;
typedef struct { real *k_BGSD, *v_BGSD; } LayerCache;
typedef enum { NO_NORM, LAYERNORM, RMSNORM } Norm;
typedef enum { RELU, GELU, GELU_TANH, RELU2, SWIGLU } Mlp;
typedef struct {
    int64_t n_layer, tokens, C, H, G, D, S, F, V;
    int64_t norm, mlp, rope;
    double rope_base;
    float norm_eps, logit_softcap;
    const real *token_embedding, *position_embedding;
    Affine norm_last, head;
    const Block *blocks;
} Model;

static inline float total(lanes x) {
    typedef float four __attribute__((vector_size(16)));
    four quarter[LANES / 4];
    memcpy(quarter, &x, sizeof x);
    for (int half = LANES / 8; half; half /= 2)
        for (int i = 0; i < half; i++) quarter[i] += quarter[i + half];
    return (quarter[0][0] + quarter[0][2]) + (quarter[0][1] + quarter[0][3]);
}

/* y[b * stride + r] (+)= w[r] . x[b], for `rows` rows, at most ROWS, and `streams` streams, at most STREAMS. */
static inline __attribute__((always_inline)) void tile(
    const real *w, const real *bias, const float *x, int64_t n, int rows, int streams, float *y, int64_t stride, int add
) {
    lanes sums[ROWS][STREAMS] = {0};
    const real *row[ROWS];
    for (int r = 0; r < ROWS; r++) row[r] = w + (r < rows ? r : rows - 1) * n; /* what is too many is not kept */
    int64_t i = 0;
    for (; i + LANES <= n; i += LANES)
        for (int r = 0; r < ROWS; r++) {
            __builtin_prefetch(row[r] + 4 * ROWS * n + i); /* processors foresee what one row needs, but not four */
            lanes weights = load_wide(row[r] + i);
            for (int b = 0; b < streams; b++) sums[r][b] += weights * load(x + b * n + i);
        }
    for (int r = 0; r < rows; r++)
        for (int b = 0; b < streams; b++) {
            float sum = total(sums[r][b]), *out = y + b * stride + r;
            for (int64_t j = i; j < n; j++) sum += wide(row[r][j]) * x[b * n + j];
            *out = sum + (bias ? wide(bias[r]) : 0) + (add ? *out : 0);
        }
}

/* ROWS rows of a product, from row r on, for all streams: x (B, n), y (B, rows). */
static void product(
    const real *w, const real *bias, const float *x, int64_t n, int64_t r, int64_t rows, int64_t B, float *y, int add
) {
    int some = rows - r < ROWS ? rows - r : ROWS;
    w += r * n, y += r, bias += bias ? r : 0;
    for (int64_t b = 0; b < B; b += STREAMS, x += STREAMS * n, y += STREAMS * rows)
        switch (B - b) { /* constants, so that the sums stay in registers */
        case 1: tile(w, bias, x, n, some, 1, y, rows, add); break;
        case 2: tile(w, bias, x, n, some, 2, y, rows, add); break;
        case 3: tile(w, bias, x, n, some, 3, y, rows, add); break;
        default: tile(w, bias, x, n, some, STREAMS, y, rows, add);
        }
}

/* The threads together: y (B, rows) = x (B, n) W^T + bias, or added to what y is. */
static void linear(Affine p, const float *x, int64_t n, float *y, int64_t rows, int64_t B, int add) {
    #pragma omp for schedule(static)
    for (int64_t r = 0; r < rows; r += ROWS) product(p.weight, p.bias, x, n, r, rows, B, y, add);
}

static void norm(const Model *m, Affine p, const float *x, float *y, int64_t n, int64_t times) {
    for (; times--; x += n, y += n) {
        float mean = 0, variance = 0, scale = 1;
        if (m->norm == LAYERNORM) {
            #pragma omp simd reduction(+ : mean)
            for (int64_t i = 0; i < n; i++) mean += x[i];
            mean /= n;
        }
        if (m->norm != NO_NORM) {
            #pragma omp simd reduction(+ : variance)
            for (int64_t i = 0; i < n; i++) variance += (x[i] - mean) * (x[i] - mean);
            scale = 1 / sqrtf(variance / n + m->norm_eps);
        }
        for (int64_t i = 0; i < n; i++)
            y[i] = (x[i] - mean) * scale * (p.weight ? wide(p.weight[i]) : 1) + (p.bias ? wide(p.bias[i]) : 0);
    }
}

/* Rotary position: pair i is (i, i + D/2). */
static void rotate(const float *cosines, const float *sines, float *x, int64_t D) {
    for (int64_t i = 0; i < D / 2; i++) {
        float a = x[i], b = x[i + D / 2];
        x[i] = a * cosines[i] - b * sines[i];
        x[i + D / 2] = b * cosines[i] + a * sines[i];
    }
}

/* y (D) = softmax(K q / sqrt(D)) V over the filled slots of one head. */
static void attend(const real *k_SD, const real *v_SD, const float *q, float *p, float *y, int64_t slots, int64_t D) {
    float most = -INFINITY, sum = 0;
    for (int64_t s = 0; s < slots; s += ROWS) product(k_SD, 0, q, D, s, slots, 1, p, 0);
    for (int64_t s = 0; s < slots; s++) most = p[s] > most ? p[s] : most;
    for (int64_t s = 0; s < slots; s++) sum += p[s] = expf((p[s] - most) / sqrtf(D));
    memset(y, 0, D * sizeof *y);
    for (int64_t s = 0; s < slots; s++, v_SD += D) {
        float share = p[s] / sum;
        for (int64_t d = 0; d < D; d++) y[d] += share * wide(v_SD[d]);
    }
}

static inline float bend(int64_t mlp, float x) {
    switch (mlp) {
    case RELU: return x < 0 ? 0 : x; /* what is no number stays none */
    case GELU: return 0.5f * x * (1 + erff(x * 0.70710678f));
    case GELU_TANH: return 0.5f * x * (1 + tanhf(0.79788456f * (x + 0.044715f * x * x * x)));
    case RELU2: return x < 0 ? 0 : x * x;
    default: return x / (1 + expf(-x)); /* SwiGLU's gate */
    }
}

static int64_t shared_floats(const Model *m) { return m->C + (2 * m->H + 2 * m->G) * m->D + 3 * m->F; }
static int64_t own_floats(const Model *m, int64_t B) { return B * (m->C + m->D) + m->S; }

/* How many floats of working memory `step` wants. */
int64_t scratch(const Model *m, int64_t B, int64_t threads) {
    return B * shared_floats(m) + threads * own_floats(m, B);
}

/* ids (B), lengths (B): the new tokens, and how many are in the cache before them. Writes logits (B, V), and keys and
   values into the cache. Returns 0, or 1 for a token or a position that the model does not have: then nothing is
   written. */
int step(
    const Model *m, const LayerCache *cache, int64_t B, const int64_t *ids, const int64_t *lengths, float *logits_BV,
    float *memory, int threads
) {
    const int64_t C = m->C, H = m->H, G = m->G, D = m->D, S = m->S, F = m->F;
    const int64_t heads = H + 2 * G, group = G ? H / G : 0, up = m->mlp == SWIGLU ? 2 * F : F;
    float *x_BC = memory, *qkv = x_BC + B * C, *y_BHD = qkv + B * heads * D, *u = y_BHD + B * H * D, *act_BF = u + B * up;
    for (int64_t b = 0; b < B; b++)
        if (ids[b] < 0 || ids[b] >= m->tokens || lengths[b] < 0 || (m->position_embedding && lengths[b] >= S)) return 1;

    #pragma omp parallel num_threads(threads)
    {
        float *h_BC = memory + B * shared_floats(m) + omp_get_thread_num() * own_floats(m, B); /* each thread its own */
        float *scores_S = h_BC + B * C, *cosines = scores_S + S, *sines = cosines + B * D / 2;
        for (int64_t i = 0; i < B * D / 2 && m->rope; i++) {
            double angle = lengths[i / (D / 2)] * pow(m->rope_base, -2.0 * (i % (D / 2)) / D);
            cosines[i] = cos(angle), sines[i] = sin(angle);
        }
        #pragma omp for schedule(static)
        for (int64_t b = 0; b < B; b++)
            for (int64_t c = 0; c < C; c++)
                x_BC[b * C + c] = wide(m->token_embedding[ids[b] * C + c]) +
                                  (m->position_embedding ? wide(m->position_embedding[lengths[b] * C + c]) : 0);

        for (int64_t layer = 0; layer < m->n_layer; layer++) {
            const Block *block = m->blocks + layer;
            norm(m, block->norm_attn, x_BC, h_BC, C, B);
            linear(block->qkv, h_BC, C, qkv, heads * D, B, 0);
            #pragma omp for schedule(static)
            for (int64_t bg = 0; bg < B * G; bg++) {
                int64_t b = bg / G, g = bg % G, slot = lengths[b] % S, slots = lengths[b] < S ? lengths[b] + 1 : S;
                float *q = qkv + (b * heads + g * group) * D, *k = qkv + (b * heads + H + g) * D, *v = k + G * D;
                const float *cosines_b = cosines + b * D / 2, *sines_b = sines + b * D / 2;
                real *k_SD = cache[layer].k_BGSD + bg * S * D, *v_SD = cache[layer].v_BGSD + bg * S * D;
                if (block->norm_q.weight) norm(m, block->norm_q, q, q, D, group), norm(m, block->norm_k, k, k, D, 1);
                for (int64_t i = 0; i < group && m->rope; i++) rotate(cosines_b, sines_b, q + i * D, D);
                if (m->rope) rotate(cosines_b, sines_b, k, D);
                for (int64_t d = 0; d < D; d++) k_SD[slot * D + d] = narrow(k[d]), v_SD[slot * D + d] = narrow(v[d]);
                for (int64_t i = 0; i < group; i++)
                    attend(k_SD, v_SD, q + i * D, scores_S, y_BHD + (b * H + g * group + i) * D, slots, D);
            }
            linear(block->proj, y_BHD, H * D, x_BC, C, B, 1);
            norm(m, block->norm_mlp, x_BC, h_BC, C, B);
            linear(block->up, h_BC, C, u, up, B, 0);
            #pragma omp for schedule(static)
            for (int64_t i = 0; i < B * F; i++) {
                const float *gate = u + i / F * up + i % F;
                act_BF[i] = bend(m->mlp, *gate) * (m->mlp == SWIGLU ? gate[F] : 1);
            }
            linear(block->down, act_BF, F, x_BC, C, B, 1);
        }
        norm(m, m->norm_last, x_BC, h_BC, C, B);
        linear(m->head, h_BC, C, logits_BV, m->V, B, 0);
        if (m->logit_softcap)
            #pragma omp for schedule(static)
            for (int64_t i = 0; i < B * m->V; i++)
                logits_BV[i] = m->logit_softcap * tanhf(logits_BV[i] / m->logit_softcap);
    }
    return 0;
}
