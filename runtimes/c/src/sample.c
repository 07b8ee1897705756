/* Picking a token from logits. Needs n floats of scratch and no sorting: the k-th largest probability, and the one at
 * which the mass reaches p, are found bit by bit, since positive floats order like their bits. */
#include "es_internal.h"

#include <string.h>

/* e^x for x <= 0, relative error below 1e-7 of a float's; 0 below -87. No libm. */
static float es_i_exp(float x)
{
    if (!(x >= -87.0f))
        return 0.0f;
    double scaled = (double)x * 1.4426950408889634;
    int k = (int)(scaled - 0.5);
    double r = (double)x - (double)k * 0.6931471805599453;
    double p = 1.0 + r * (1.0 + r * (0.5 + r * (1.0 / 6 + r * (1.0 / 24 + r * (1.0 / 120 + r * (1.0 / 720))))));
    uint64_t bits = (uint64_t)(k + 1023) << 52;
    double power;
    memcpy(&power, &bits, sizeof power);
    return (float)(p * power);
}

/* splitmix64 (Steele, Lea, Flood 2014): uniform in [0, 1) with 53 bits. */
static double es_i_uniform(uint64_t *seed)
{
    *seed += 0x9e3779b97f4a7c15u;
    uint64_t z = *seed;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return (double)((z ^ (z >> 31)) >> 11) * (1.0 / 9007199254740992.0);
}

/* Index of the largest, the first of equals; -1 when none is a number. */
static int32_t es_i_argmax(const float *x, size_t n)
{
    int32_t best = -1;
    for (size_t i = 0; i < n; i++)
        if (x[i] == x[i] && (best < 0 || x[i] > x[best]))
            best = (int32_t)i;
    return best;
}

/* Sum of the probabilities >= t, or how many they are. */
static double es_i_above(const float *p, size_t n, float t, int by_mass)
{
    double sum = 0;
    for (size_t i = 0; i < n; i++)
        sum += p[i] >= t ? (by_mass ? (double)p[i] : 1.0) : 0.0;
    return sum;
}

/* Keeps the fewest largest of p[n] in [0, 1] whose mass (or count) reaches `goal`; zeroes the rest. Among equals the
 * first stay. */
static void es_i_keep(float *p, size_t n, double goal, int by_mass)
{
    uint32_t bits = 0;
    float t, next;
    for (uint32_t bit = 1u << 29; bit > 0; bit >>= 1) {
        uint32_t candidate = bits | bit;
        memcpy(&t, &candidate, sizeof t);
        if (es_i_above(p, n, t, by_mass) >= goal)
            bits = candidate;
    }
    uint32_t above = bits + 1;
    memcpy(&t, &bits, sizeof t);
    memcpy(&next, &above, sizeof next);
    double missing = goal - es_i_above(p, n, next, by_mass);
    for (size_t i = 0; i < n; i++) {
        if (p[i] < t || (p[i] == t && missing <= 0))
            p[i] = 0.0f;
        else if (p[i] == t)
            missing -= by_mass ? (double)t : 1.0;
    }
}

static es_status es_i_sampler_check(const es_sampler *s)
{
    if (s->struct_size < sizeof *s)
        return ES_E_STRUCT;
    int good = s->temperature >= 0.0f && s->temperature <= 1e6f && s->top_k >= 0 && s->top_p > 0.0f &&
               s->top_p <= 1.0f && s->min_p >= 0.0f && s->min_p <= 1.0f && s->repetition_penalty > 0.0f &&
               s->repetition_penalty <= 1e6f;
    return good ? ES_OK : ES_E_SAMPLER;
}

static int es_i_penalised(const es_sampler *s)
{
    return s->repetition_penalty < 1.0f || s->repetition_penalty > 1.0f;
}

/* Each recent token once, however often it is there: the penalty is taken from the untouched logit. */
static es_status es_i_penalise(float *to, const float *logits, size_t n, float penalty, const int32_t *recent,
                               size_t n_recent)
{
    for (size_t i = 0; i < n_recent; i++) {
        int32_t id = recent[i];
        if (id < 0 || (size_t)id >= n)
            return ES_E_TOKEN;
        to[id] = logits[id] > 0.0f ? logits[id] / penalty : logits[id] * penalty;
    }
    return ES_OK;
}

static int32_t es_i_draw(const float *p, size_t n, uint64_t *seed)
{
    double goal = es_i_uniform(seed) * es_i_above(p, n, 0.0f, 1), sum = 0;
    int32_t last = -1;
    for (size_t i = 0; i < n; i++) {
        if (p[i] <= 0.0f)
            continue;
        last = (int32_t)i;
        sum += (double)p[i];
        if (sum > goal)
            break;
    }
    return last;
}

/* p[i] = exp((x[i] - max) / temperature), not normalised: the largest is 1. */
static void es_i_soften(float *x, size_t n, float max, float temperature)
{
    for (size_t i = 0; i < n; i++)
        x[i] = x[i] == max ? 1.0f : es_i_exp((x[i] - max) / temperature);
}

es_status es_sample_logits(es_sampler *sampler, const float *logits, size_t n, const int32_t *recent, size_t n_recent,
                           float *scratch, int32_t *token)
{
    static const es_sampler greedy = ES_SAMPLER_INIT;
    const es_sampler *s = sampler != NULL ? sampler : &greedy;
    if (logits == NULL || token == NULL || (recent == NULL && n_recent > 0))
        return ES_E_NULL;
    if (n < 1 || n > INT32_MAX)
        return ES_E_RANGE;
    es_status status = es_i_sampler_check(s);
    if (status != ES_OK)
        return status;
    int penalised = es_i_penalised(s);
    if (s->temperature > 0.0f || penalised) {
        if (scratch == NULL)
            return ES_E_NULL;
        memcpy(scratch, logits, n * sizeof *scratch);
        if (penalised)
            status = es_i_penalise(scratch, logits, n, s->repetition_penalty, recent, n_recent);
        if (status != ES_OK)
            return status;
        logits = scratch;
    }
    int32_t best = es_i_argmax(logits, n);
    if (best < 0)
        return ES_E_NAN;
    *token = best;
    if (!(s->temperature > 0.0f))
        return ES_OK;
    es_i_soften(scratch, n, scratch[best], s->temperature);
    if (s->top_k > 0 && (size_t)s->top_k < n)
        es_i_keep(scratch, n, (double)s->top_k, 0);
    if (s->top_p < 1.0f)
        es_i_keep(scratch, n, (double)s->top_p * es_i_above(scratch, n, 0.0f, 1), 1);
    for (size_t i = 0; i < n; i++)
        scratch[i] = scratch[i] < s->min_p ? 0.0f : scratch[i];
    *token = es_i_draw(scratch, n, &sampler->seed);
    return ES_OK;
}

es_status es_sample(es_session *session, es_sampler *sampler, const int32_t *recent, size_t n_recent, int32_t *token)
{
    if (session == NULL || token == NULL)
        return ES_E_NULL;
    if (session->failed != ES_OK)
        return session->failed;
    if (session->logits == NULL)
        return ES_E_NO_LOGITS;
    return es_sample_logits(sampler, session->logits, session->model->plan.vocab, recent, n_recent,
                            (float *)(void *)session->arena, token);
}

es_status es_generate(es_session *session, es_sampler *sampler, size_t n, size_t window, int32_t *tokens, uint64_t *ns)
{
    if (session == NULL || (tokens == NULL && n > 0))
        return ES_E_NULL;
    if (session->model->roles[0].tokens == NULL)
        return ES_E_NO_TOKENS;
    es_status status = session->failed != ES_OK ? session->failed : es_i_room_check(session, n);
    if (status == ES_OK && sampler != NULL)
        status = es_i_sampler_check(sampler);
    int greedy = sampler == NULL || (status == ES_OK && !(sampler->temperature > 0.0f) && !es_i_penalised(sampler));
    if (status == ES_OK && greedy && es_i_greedy(session, n, tokens, ns, &status))
        return status;
    for (size_t i = 0; i < n && status == ES_OK; i++) {
        size_t recent = i < window ? i : window;
        uint64_t start = ns != NULL ? es_i_now() : 0;
        status = es_sample(session, sampler, tokens + (i - recent), recent, &tokens[i]);
        if (status == ES_OK)
            status = es_step(session, tokens[i]);
        if (ns != NULL)
            ns[i] = es_i_now() - start;
    }
    return status;
}
