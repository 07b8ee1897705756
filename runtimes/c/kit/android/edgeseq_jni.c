/* ai.edgeseq.Model and Session on edgeseq.h. Handles are pointers; the classes check that they are open. */
#include "edgeseq.h"

#include <jni.h>
#include <stdlib.h>
#include <string.h>

#define MODEL(name) Java_ai_edgeseq_Model_##name
#define SESSION(name) Java_ai_edgeseq_Session_##name

static jbyteArray bytes_of(JNIEnv *env, const void *data, size_t n)
{
    if (n > 0x7fffffff)
        return NULL;
    jbyteArray array = (*env)->NewByteArray(env, (jsize)n);
    if (array != NULL)
        (*env)->SetByteArrayRegion(env, array, 0, (jsize)n, (const jbyte *)data);
    return array;
}

static jintArray ints_of(JNIEnv *env, const int32_t *data, size_t n)
{
    jintArray array = (*env)->NewIntArray(env, (jsize)n);
    if (array != NULL)
        (*env)->SetIntArrayRegion(env, array, 0, (jsize)n, (const jint *)data);
    return array;
}

/* Throws unless the status is 0; returns whether it threw. */
static int failed(JNIEnv *env, es_status status, const es_error *why)
{
    if (status == ES_OK)
        return 0;
    const char *text = why != NULL && why->text[0] != '\0' ? why->text : es_status_text(status);
    jclass class = (*env)->FindClass(env, "ai/edgeseq/EdgeseqException");
    jmethodID make = class != NULL ? (*env)->GetMethodID(env, class, "<init>", "(I[B)V") : NULL;
    jbyteArray sentence = make != NULL ? bytes_of(env, text, strlen(text)) : NULL;
    jobject exception = sentence != NULL ? (*env)->NewObject(env, class, make, (jint)status, sentence) : NULL;
    if (exception != NULL)
        (*env)->Throw(env, (jthrowable)exception);
    return 1;
}

/* Room for n elements, at least one; throws when there is none. */
static void *room(JNIEnv *env, size_t n, size_t each)
{
    void *memory = calloc(n > 0 ? n : 1, each);
    if (memory == NULL)
        (void)failed(env, ES_E_HEAP, NULL);
    return memory;
}

static int32_t *tokens_of(JNIEnv *env, jintArray array, size_t *n)
{
    if (array == NULL)
        return failed(env, ES_E_NULL, NULL), NULL;
    *n = (size_t)(*env)->GetArrayLength(env, array);
    int32_t *tokens = (int32_t *)room(env, *n, sizeof *tokens);
    if (tokens != NULL)
        (*env)->GetIntArrayRegion(env, array, 0, (jsize)*n, (jint *)tokens);
    return tokens;
}

static char *text_of(JNIEnv *env, jbyteArray array, size_t *n)
{
    if (array == NULL)
        return failed(env, ES_E_NULL, NULL), NULL;
    *n = (size_t)(*env)->GetArrayLength(env, array);
    char *text = (char *)room(env, *n, 1);
    if (text != NULL)
        (*env)->GetByteArrayRegion(env, array, 0, (jsize)*n, (jbyte *)text);
    return text;
}

JNIEXPORT jlong JNICALL MODEL(open)(JNIEnv *env, jclass class, jbyteArray path, jint threads)
{
    (void)class;
    es_error why = ES_ERROR_INIT;
    es_options options = ES_OPTIONS_INIT;
    es_model *model = NULL;
    size_t n = 0;
    char *text = text_of(env, path, &n); /* ends with NUL: the class adds it */
    if (text == NULL)
        return 0;
    options.n_threads = threads;
    (void)failed(env, es_model_open(text, &options, &model, &why), &why);
    free(text);
    return (jlong)(intptr_t)model;
}

JNIEXPORT void JNICALL MODEL(close)(JNIEnv *env, jclass class, jlong handle)
{
    (void)class;
    es_model *model = (es_model *)(intptr_t)handle;
    (void)failed(env, es_model_close(&model), NULL);
}

JNIEXPORT jlong JNICALL MODEL(createSession)(JNIEnv *env, jclass class, jlong model)
{
    (void)class;
    es_error why = ES_ERROR_INIT;
    es_session *session = NULL;
    (void)failed(env, es_session_create((es_model *)(intptr_t)model, NULL, 0, &session, &why), &why);
    return (jlong)(intptr_t)session;
}

JNIEXPORT jint JNICALL MODEL(vocab)(JNIEnv *env, jclass class, jlong model)
{
    (void)class;
    es_model_info info = ES_MODEL_INFO_INIT;
    (void)failed(env, es_model_get_info((es_model *)(intptr_t)model, &info), NULL);
    return (jint)info.vocab;
}

JNIEXPORT jint JNICALL MODEL(context)(JNIEnv *env, jclass class, jlong model)
{
    (void)class;
    es_model_info info = ES_MODEL_INFO_INIT;
    (void)failed(env, es_model_get_info((es_model *)(intptr_t)model, &info), NULL);
    return (jint)info.context;
}

JNIEXPORT jbyteArray JNICALL MODEL(device)(JNIEnv *env, jclass class, jlong model)
{
    (void)class;
    es_device_info info = ES_DEVICE_INFO_INIT;
    if (failed(env, es_model_device((es_model *)(intptr_t)model, &info), NULL))
        return NULL;
    return bytes_of(env, info.text, strlen(info.text));
}

JNIEXPORT jintArray JNICALL MODEL(encode)(JNIEnv *env, jclass class, jlong handle, jbyteArray array)
{
    (void)class;
    const es_model *model = (es_model *)(intptr_t)handle;
    size_t bytes = 0, n = 0;
    jintArray result = NULL;
    char *text = text_of(env, array, &bytes);
    if (text == NULL)
        return NULL;
    if (!failed(env, es_encode(model, text, bytes, NULL, 0, &n), NULL)) {
        int32_t *tokens = (int32_t *)room(env, n, sizeof *tokens);
        if (tokens != NULL && !failed(env, es_encode(model, text, bytes, tokens, n, &n), NULL))
            result = ints_of(env, tokens, n);
        free(tokens);
    }
    free(text);
    return result;
}

JNIEXPORT jbyteArray JNICALL MODEL(decode)(JNIEnv *env, jclass class, jlong handle, jintArray array)
{
    (void)class;
    const es_model *model = (es_model *)(intptr_t)handle;
    size_t bytes = 0, n = 0;
    jbyteArray result = NULL;
    int32_t *tokens = tokens_of(env, array, &n);
    char *text = tokens != NULL ? (char *)room(env, n, 1) : NULL; /* a token is a byte */
    if (text != NULL && !failed(env, es_decode(model, tokens, n, text, n, &bytes), NULL))
        result = bytes_of(env, text, bytes);
    free(text);
    free(tokens);
    return result;
}

JNIEXPORT void JNICALL SESSION(prefill)(JNIEnv *env, jclass class, jlong session, jintArray array)
{
    (void)class;
    size_t n = 0;
    int32_t *tokens = tokens_of(env, array, &n);
    if (tokens != NULL)
        (void)failed(env, es_prefill((es_session *)(intptr_t)session, tokens, n), NULL);
    free(tokens);
}

JNIEXPORT void JNICALL SESSION(step)(JNIEnv *env, jclass class, jlong session, jint token)
{
    (void)class;
    (void)failed(env, es_step((es_session *)(intptr_t)session, token), NULL);
}

JNIEXPORT jint JNICALL SESSION(sample)(JNIEnv *env, jclass class, jlong session, jfloat temperature, jint top_k,
                                       jfloat top_p, jfloat min_p, jlongArray seed)
{
    (void)class;
    es_sampler sampler = ES_SAMPLER_INIT;
    int32_t token = -1;
    jlong state = 0;
    (*env)->GetLongArrayRegion(env, seed, 0, 1, &state);
    sampler.temperature = temperature;
    sampler.top_k = top_k;
    sampler.top_p = top_p;
    sampler.min_p = min_p;
    sampler.seed = (uint64_t)state;
    if (!failed(env, es_sample((es_session *)(intptr_t)session, &sampler, NULL, 0, &token), NULL)) {
        state = (jlong)sampler.seed;
        (*env)->SetLongArrayRegion(env, seed, 0, 1, &state);
    }
    return token;
}

JNIEXPORT jintArray JNICALL SESSION(generate)(JNIEnv *env, jclass class, jlong session, jint count)
{
    (void)class;
    jintArray result = NULL;
    if (count < 0)
        return failed(env, ES_E_RANGE, NULL), NULL;
    int32_t *tokens = (int32_t *)room(env, (size_t)count, sizeof *tokens);
    if (tokens != NULL &&
        !failed(env, es_generate((es_session *)(intptr_t)session, NULL, (size_t)count, 0, tokens, NULL), NULL))
        result = ints_of(env, tokens, (size_t)count);
    free(tokens);
    return result;
}

JNIEXPORT jfloatArray JNICALL SESSION(logits)(JNIEnv *env, jclass class, jlong session, jint n)
{
    (void)class;
    const float *logits = es_logits((es_session *)(intptr_t)session);
    if (logits == NULL)
        return NULL;
    jfloatArray array = (*env)->NewFloatArray(env, n);
    if (array != NULL)
        (*env)->SetFloatArrayRegion(env, array, 0, n, logits);
    return array;
}

JNIEXPORT jlong JNICALL SESSION(position)(JNIEnv *env, jclass class, jlong session)
{
    (void)env, (void)class;
    return (jlong)es_position((es_session *)(intptr_t)session);
}

JNIEXPORT void JNICALL SESSION(reset)(JNIEnv *env, jclass class, jlong session)
{
    (void)class;
    (void)failed(env, es_reset((es_session *)(intptr_t)session), NULL);
}

JNIEXPORT jbyteArray JNICALL SESSION(save)(JNIEnv *env, jclass class, jlong handle)
{
    (void)class;
    const es_session *session = (es_session *)(intptr_t)handle;
    size_t bytes = 0;
    jbyteArray result = NULL;
    if (failed(env, es_state_bytes(session, &bytes), NULL))
        return NULL;
    if (bytes > 0x7fffffff)
        return failed(env, ES_E_ROOM, NULL), NULL;
    void *state = room(env, bytes, 1);
    if (state != NULL && !failed(env, es_state_save(session, state, bytes, &bytes), NULL))
        result = bytes_of(env, state, bytes);
    free(state);
    return result;
}

JNIEXPORT void JNICALL SESSION(load)(JNIEnv *env, jclass class, jlong session, jbyteArray array)
{
    (void)class;
    es_error why = ES_ERROR_INIT;
    size_t bytes = 0;
    char *state = text_of(env, array, &bytes);
    if (state != NULL)
        (void)failed(env, es_state_load((es_session *)(intptr_t)session, state, bytes, &why), &why);
    free(state);
}

JNIEXPORT void JNICALL SESSION(close)(JNIEnv *env, jclass class, jlong handle)
{
    (void)class;
    es_session *session = (es_session *)(intptr_t)handle;
    (void)failed(env, es_session_close(&session), NULL);
}
