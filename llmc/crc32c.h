// crc32c.h: CRC-32C (Castagnoli), the checksum in every file a run writes.
//
//     crc32c(0, "123456789", 9) == 0xE3069283
//     crc32c(crc32c(0, a, na), b, nb) is the checksum of a followed by b
//
// The polynomial 0x1EDC6F41, bits reflected: 0x82F63B78. Built for x86 with SSE4.2 it uses the
// crc32 instruction (AMD EPYC: 7 GB/s), else eight tables at a time ("slicing by 8", Kounavis and
// Berry 2005; 1.5 GB/s). A sealed text is one that holds its own checksum as 8 hexadecimal digits,
// computed with those digits as 00000000: crc32c_sealed.
#ifndef LLMC_CRC32C_H
#define LLMC_CRC32C_H

#include <stddef.h>
#include <stdint.h>
#include <string.h>

#ifdef __SSE4_2__
#include <nmmintrin.h>  // _mm_crc32_u64, _mm_crc32_u8
#endif

// Without the instruction. The tables are built on the stack at every call, in about 1 us: there is
// nothing to set up before and nothing that threads share.
static inline uint32_t crc32c_tables(uint32_t crc, const void *data, size_t n) {
    uint32_t table[8][256];
    for (uint32_t i = 0; i < 256; i++) {
        uint32_t c = i;
        for (int bit = 0; bit < 8; bit++) c = c & 1 ? c >> 1 ^ 0x82F63B78u : c >> 1;
        table[0][i] = c;
    }
    for (int k = 1; k < 8; k++)  // table[k][i]: byte i followed by k zero bytes
        for (int i = 0; i < 256; i++)
            table[k][i] = table[k - 1][i] >> 8 ^ table[0][table[k - 1][i] & 255];

    const unsigned char *p = (const unsigned char *)data;
    crc = ~crc;
    for (; n >= 8; n -= 8, p += 8) {
        uint64_t word;
        memcpy(&word, p, 8);
        word ^= crc;
        crc = table[7][word & 255] ^ table[6][word >> 8 & 255] ^ table[5][word >> 16 & 255] ^
              table[4][word >> 24 & 255] ^ table[3][word >> 32 & 255] ^ table[2][word >> 40 & 255] ^
              table[1][word >> 48 & 255] ^ table[0][word >> 56];
    }
    for (; n; n--) crc = crc >> 8 ^ table[0][(crc ^ *p++) & 255];
    return ~crc;
}

#ifdef __SSE4_2__
static inline uint32_t crc32c(uint32_t crc, const void *data, size_t n) {
    const unsigned char *p = (const unsigned char *)data;
    uint64_t c = (uint32_t)~crc;
    for (; n >= 8; n -= 8, p += 8) {
        uint64_t word;
        memcpy(&word, p, 8);
        c = _mm_crc32_u64(c, word);
    }
    for (; n; n--) c = _mm_crc32_u8((uint32_t)c, *p++);
    return ~(uint32_t)c;
}
#else
static inline uint32_t crc32c(uint32_t crc, const void *data, size_t n) {
    return crc32c_tables(crc, data, n);
}
#endif

// The checksum of a text as if the 8 digits at offset `digits` were zeros.
static inline uint32_t crc32c_sealed(const char *text, size_t size, size_t digits) {
    uint32_t crc = crc32c(0, text, digits);
    crc = crc32c(crc, "00000000", 8);
    return crc32c(crc, text + digits + 8, size - digits - 8);
}

#endif
