/* Programs as the driver built them, beside the bundle: "model.edgeseq.<device>-<source>.clbin", two checksums in the
 * name. The file: magic, u32 bytes of the identity, u32 checksum of the binary, u64 bytes of the binary, the identity
 * (device, versions, checksum of the source), the binary. What does not fit in every byte is built again. */
#include "es_opencl.h"

#ifdef ES_WITH_OPENCL
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

static const char es_i_cl_magic[8] = {'E', 'S', 'C', 'L', 'B', 'I', 'N', '1'};
enum { ES_CL_CACHE_HEADER = 24, ES_CL_IDENTITY = 768 };

typedef struct {
    char text[ES_CL_IDENTITY];
    char *path; /* malloc */
    uint32_t bytes;
} es_i_cl_identity;

/* 0 when there is no path to keep anything at. */
static int es_i_cl_identify(const es_i_cl_device *device, const char *path, const es_i_crc *crc, es_i_cl_identity *id)
{
    const es_i_section *code = device->plan->section[ES_CODE];
    if (path == NULL)
        return 0;
    int n = snprintf(id->text, sizeof id->text, "%s|%s|%s|%s|%08x|%llu", device->platform_text, device->name,
                     device->version, device->driver, code->crc, (unsigned long long)code->bytes);
    if (n < 0 || (size_t)n >= sizeof id->text)
        return 0;
    id->bytes = (uint32_t)n;
    size_t room = strlen(path) + 64;
    id->path = (char *)malloc(room);
    if (id->path == NULL)
        return 0;
    (void)snprintf(id->path, room, "%s.%08x-%08x.clbin", path, es_i_crc32(crc, 0, id->text, id->bytes), code->crc);
    return 1;
}

/* The whole file, or NULL. */
static uint8_t *es_i_cl_file_read(const char *path, size_t *bytes)
{
    struct stat file;
    uint8_t *data = NULL;
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    if (fd < 0)
        return NULL;
    if (fstat(fd, &file) == 0 && S_ISREG(file.st_mode) && file.st_size > ES_CL_CACHE_HEADER &&
        file.st_size < (off_t)1 << 30)
        data = (uint8_t *)malloc((size_t)file.st_size);
    size_t have = 0;
    while (data != NULL && have < (size_t)file.st_size) {
        ssize_t n = read(fd, data + have, (size_t)file.st_size - have);
        if (n <= 0)
            break;
        have += (size_t)n;
    }
    (void)close(fd);
    if (data != NULL && have < (size_t)file.st_size) {
        free(data);
        return NULL;
    }
    *bytes = have;
    return data;
}

/* Where the binary starts, NULL when the file is not this identity's or damaged. */
static const uint8_t *es_i_cl_cache_check(const uint8_t *data, size_t bytes, const es_i_crc *crc,
                                          const es_i_cl_identity *id, size_t *binary_bytes)
{
    uint32_t identity, sum;
    uint64_t binary;
    memcpy(&identity, data + 8, sizeof identity);
    memcpy(&sum, data + 12, sizeof sum);
    memcpy(&binary, data + 16, sizeof binary);
    size_t rest = bytes - ES_CL_CACHE_HEADER;
    if (memcmp(data, es_i_cl_magic, sizeof es_i_cl_magic) != 0 || identity != id->bytes || identity > rest ||
        binary != rest - identity || binary == 0 || memcmp(data + ES_CL_CACHE_HEADER, id->text, identity) != 0)
        return NULL;
    const uint8_t *start = data + ES_CL_CACHE_HEADER + identity;
    *binary_bytes = (size_t)binary;
    return es_i_crc32(crc, 0, start, (size_t)binary) == sum ? start : NULL;
}

es_i_cl_program es_i_cl_cache_read(const es_i_cl_device *device, const char *path)
{
    es_i_crc crc;
    es_i_cl_identity id;
    es_i_cl_program program = NULL;
    size_t bytes = 0, binary_bytes = 0;
    es_i_crc_init(&crc);
    if (!es_i_cl_identify(device, path, &crc, &id))
        return NULL;
    uint8_t *data = es_i_cl_file_read(id.path, &bytes);
    const uint8_t *binary = data != NULL ? es_i_cl_cache_check(data, bytes, &crc, &id, &binary_bytes) : NULL;
    if (binary != NULL) {
        int32_t status = 0, code = 0;
        const unsigned char *start = binary;
        program =
            device->cl.CreateProgramWithBinary(device->context, 1, &device->id, &binary_bytes, &start, &status, &code);
        if (program != NULL && (status != 0 || device->cl.BuildProgram(program, 1, &device->id, "", NULL, NULL) != 0)) {
            device->cl.ReleaseProgram(program);
            program = NULL;
        }
    }
    free(data);
    free(id.path);
    return program;
}

static int es_i_cl_all_written(int fd, const uint8_t *data, size_t bytes)
{
    while (bytes > 0) {
        ssize_t n = write(fd, data, bytes);
        if (n <= 0)
            return 0;
        data += n;
        bytes -= (size_t)n;
    }
    return 1;
}

/* Under a name of this process, then renamed: a reader sees a whole file or none. */
static void es_i_cl_file_write(const char *path, const uint8_t *data, size_t bytes)
{
    size_t room = strlen(path) + 32;
    char *temporary = (char *)malloc(room);
    if (temporary == NULL)
        return;
    (void)snprintf(temporary, room, "%s.%ld.tmp", path, (long)getpid());
    int fd = open(temporary, O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0644);
    if (fd >= 0) {
        int whole = es_i_cl_all_written(fd, data, bytes);
        if (close(fd) != 0 || !whole || rename(temporary, path) != 0)
            (void)unlink(temporary);
    }
    free(temporary);
}

void es_i_cl_cache_write(const es_i_cl_device *device, const char *path, es_i_cl_program program)
{
    es_i_crc crc;
    es_i_cl_identity id;
    size_t bytes = 0;
    es_i_crc_init(&crc);
    if (!es_i_cl_identify(device, path, &crc, &id))
        return;
    if (device->cl.GetProgramInfo(program, ES_CL_PROGRAM_BINARY_SIZES, sizeof bytes, &bytes, NULL) != 0)
        bytes = 0;
    size_t before = ES_CL_CACHE_HEADER + id.bytes;
    uint8_t *data = bytes > 0 && bytes < (1u << 30) - before ? (uint8_t *)malloc(before + bytes) : NULL;
    uint8_t *binary = data != NULL ? data + before : NULL;
    if (data != NULL && device->cl.GetProgramInfo(program, ES_CL_PROGRAM_BINARIES, sizeof binary, &binary, NULL) == 0) {
        uint32_t sum = es_i_crc32(&crc, 0, binary, bytes);
        uint64_t wide = bytes;
        memcpy(data, es_i_cl_magic, sizeof es_i_cl_magic);
        memcpy(data + 8, &id.bytes, sizeof id.bytes);
        memcpy(data + 12, &sum, sizeof sum);
        memcpy(data + 16, &wide, sizeof wide);
        memcpy(data + ES_CL_CACHE_HEADER, id.text, id.bytes);
        es_i_cl_file_write(id.path, data, before + bytes);
    }
    free(data);
    free(id.path);
}
#endif
