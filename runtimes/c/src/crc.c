/* CRC-32 (IEEE 802.3, reflected, as in zlib), eight bytes at a time. */
#include "es_internal.h"

#include <string.h>

void es_i_crc_init(es_i_crc *crc)
{
    for (uint32_t byte = 0; byte < 256; byte++) {
        uint32_t value = byte;
        for (int bit = 0; bit < 8; bit++)
            value = (value >> 1) ^ (0xedb88320u & (0u - (value & 1u)));
        crc->table[0][byte] = value;
    }
    for (uint32_t byte = 0; byte < 256; byte++)
        for (int k = 1; k < 8; k++) {
            uint32_t before = crc->table[k - 1][byte];
            crc->table[k][byte] = (before >> 8) ^ crc->table[0][before & 0xffu];
        }
}

uint32_t es_i_crc32(const es_i_crc *crc, uint32_t value, const void *data, size_t bytes)
{
    const uint8_t *p = (const uint8_t *)data;
    value = ~value;
    for (; bytes >= 8; bytes -= 8, p += 8) {
        uint32_t low, high;
        memcpy(&low, p, 4);
        memcpy(&high, p + 4, 4);
        low ^= value;
        value = crc->table[7][low & 0xffu] ^ crc->table[6][(low >> 8) & 0xffu] ^ crc->table[5][(low >> 16) & 0xffu] ^
                crc->table[4][low >> 24] ^ crc->table[3][high & 0xffu] ^ crc->table[2][(high >> 8) & 0xffu] ^
                crc->table[1][(high >> 16) & 0xffu] ^ crc->table[0][high >> 24];
    }
    for (; bytes > 0; bytes--, p++)
        value = (value >> 8) ^ crc->table[0][(value ^ *p) & 0xffu];
    return ~value;
}
