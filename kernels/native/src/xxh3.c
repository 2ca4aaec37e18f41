/* XXH3-64 of long inputs, seed 0, as the xxHash specification has it (github.com/Cyan4973/xxHash,
   doc/xxhash_spec.md): eight lanes of 64 bits take stripes of 64 bytes and are scrambled after every
   1,024. Numbers are read as they lie in memory, so this is for little-endian machines. */
#include "exported.h"

#define STRIPE 64
#define STRIPES 16 /* of a block: the secret moves on by 8 bytes for each */

typedef uint64_t u64x4 __attribute__((vector_size(32)));

static const uint64_t P32_1 = 0x9E3779B1, P32_2 = 0x85EBCA77, P32_3 = 0xC2B2AE3D;
static const uint64_t P64_1 = 0x9E3779B185EBCA87, P64_2 = 0xC2B2AE3D27D4EB4F,
                      P64_3 = 0x165667B19E3779F9, P64_4 = 0x85EBCA77C2B2AE63,
                      P64_5 = 0x27D4EB2F165667C5;

static const uint8_t secret[192] = {
    0xb8, 0xfe, 0x6c, 0x39, 0x23, 0xa4, 0x4b, 0xbe, 0x7c, 0x01, 0x81, 0x2c, 0xf7, 0x21, 0xad, 0x1c,
    0xde, 0xd4, 0x6d, 0xe9, 0x83, 0x90, 0x97, 0xdb, 0x72, 0x40, 0xa4, 0xa4, 0xb7, 0xb3, 0x67, 0x1f,
    0xcb, 0x79, 0xe6, 0x4e, 0xcc, 0xc0, 0xe5, 0x78, 0x82, 0x5a, 0xd0, 0x7d, 0xcc, 0xff, 0x72, 0x21,
    0xb8, 0x08, 0x46, 0x74, 0xf7, 0x43, 0x24, 0x8e, 0xe0, 0x35, 0x90, 0xe6, 0x81, 0x3a, 0x26, 0x4c,
    0x3c, 0x28, 0x52, 0xbb, 0x91, 0xc3, 0x00, 0xcb, 0x88, 0xd0, 0x65, 0x8b, 0x1b, 0x53, 0x2e, 0xa3,
    0x71, 0x64, 0x48, 0x97, 0xa2, 0x0d, 0xf9, 0x4e, 0x38, 0x19, 0xef, 0x46, 0xa9, 0xde, 0xac, 0xd8,
    0xa8, 0xfa, 0x76, 0x3f, 0xe3, 0x9c, 0x34, 0x3f, 0xf9, 0xdc, 0xbb, 0xc7, 0xc7, 0x0b, 0x4f, 0x1d,
    0x8a, 0x51, 0xe0, 0x4b, 0xcd, 0xb4, 0x59, 0x31, 0xc8, 0x9f, 0x7e, 0xc9, 0xd9, 0x78, 0x73, 0x64,
    0xea, 0xc5, 0xac, 0x83, 0x34, 0xd3, 0xeb, 0xc3, 0xc5, 0x81, 0xa0, 0xff, 0xfa, 0x13, 0x63, 0xeb,
    0x17, 0x0d, 0xdd, 0x51, 0xb7, 0xf0, 0xda, 0x49, 0xd3, 0x16, 0x55, 0x26, 0x29, 0xd4, 0x68, 0x9e,
    0x2b, 0x16, 0xbe, 0x58, 0x7d, 0x47, 0xa1, 0xfc, 0x8f, 0xf8, 0xb8, 0xd1, 0x7a, 0xd0, 0x31, 0xce,
    0x45, 0xcb, 0x3a, 0x8f, 0x95, 0x16, 0x04, 0x28, 0xaf, 0xd7, 0xfb, 0xca, 0xbb, 0x4b, 0x40, 0x7e,
};

INLINE u64x4 load_u64(const uint8_t *p) {
    u64x4 x;
    memcpy(&x, p, sizeof x);
    return x;
}

/* The product of the lower halves of 64-bit lanes. */
INLINE u64x4 low_product(u64x4 a, u64x4 b) {
#ifdef __AVX2__
    return (u64x4)_mm256_mul_epu32((__m256i)a, (__m256i)b);
#else
    return (a & 0xffffffff) * (b & 0xffffffff);
#endif
}

INLINE u64x4 neighbours(u64x4 x) {
#ifdef __AVX2__
    return (u64x4)_mm256_shuffle_epi32((__m256i)x, 0x4e);
#else
    return (u64x4){x[1], x[0], x[3], x[2]};
#endif
}

INLINE void take(u64x4 acc[2], const uint8_t *data, const uint8_t *key) {
    for (int half = 0; half < 2; half++) {
        u64x4 x = load_u64(data + 32 * half), mixed = x ^ load_u64(key + 32 * half);
        acc[half] += low_product(mixed, mixed >> 32) + neighbours(x);
    }
}

INLINE void scramble(u64x4 acc[2]) {
    for (int half = 0; half < 2; half++) {
        u64x4 x = acc[half] ^ (acc[half] >> 47) ^ load_u64(secret + 128 + 32 * half);
        u64x4 prime = {P32_1, P32_1, P32_1, P32_1};
        acc[half] = low_product(x, prime) + (low_product(x >> 32, prime) << 32);
    }
}

static uint64_t folded(uint64_t a, uint64_t b) {
    unsigned __int128 product = (unsigned __int128)a * b;
    return (uint64_t)product ^ (uint64_t)(product >> 64);
}

/* n: more than 240. */
EXPORT uint64_t xxh3_64(const uint8_t *data, int64_t n) {
    u64x4 acc[2] = {{P32_3, P64_1, P64_2, P64_3}, {P64_4, P32_2, P64_5, P32_1}};
    int64_t whole = (n - 1) / (STRIPE * STRIPES) * STRIPES, stripes = (n - 1) / STRIPE;
    for (int64_t block = 0; block < whole; block += STRIPES) {
        for (int64_t i = 0; i < STRIPES; i++) {
            const uint8_t *at = data + (block + i) * STRIPE;
            __builtin_prefetch(at + 1024);
            take(acc, at, secret + 8 * i);
        }
        scramble(acc);
    }
    for (int64_t i = whole; i < stripes; i++) take(acc, data + i * STRIPE, secret + 8 * (i - whole));
    take(acc, data + n - STRIPE, secret + sizeof secret - STRIPE - 7);
    uint64_t lanes[8], sum = (uint64_t)n * P64_1;
    memcpy(lanes, acc, sizeof lanes);
    for (int i = 0; i < 4; i++) {
        uint64_t keys[2];
        memcpy(keys, secret + 11 + 16 * i, sizeof keys);
        sum += folded(lanes[2 * i] ^ keys[0], lanes[2 * i + 1] ^ keys[1]);
    }
    sum ^= sum >> 37;
    sum *= 0x165667919E3779F9;
    return sum ^ (sum >> 32);
}
