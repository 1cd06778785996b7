// test_crc32c.c: llmc/crc32c.h against published values, and its two ways against each other.
#include "dev/test/test.h"
#include "llmc/crc32c.h"

TEST(known_values) {  // RFC 3720, B.4, and the check value of the CRC catalogue
    unsigned char zeros[32] = {0}, ones[32], up[32], down[32];
    memset(ones, 0xFF, 32);
    for (int i = 0; i < 32; i++) up[i] = (unsigned char)i, down[i] = (unsigned char)(31 - i);
    CHECK_INT(crc32c(0, "123456789", 9), 0xE3069283);
    CHECK_INT(crc32c(0, zeros, 32), 0x8A9136AA);
    CHECK_INT(crc32c(0, ones, 32), 0x62A8AB43);
    CHECK_INT(crc32c(0, up, 32), 0x46DD794E);
    CHECK_INT(crc32c(0, down, 32), 0x113FDB5C);
    CHECK_INT(crc32c(0, "", 0), 0);
    CHECK_INT(crc32c_tables(0, "123456789", 9), 0xE3069283);
}

TEST(tables_equal_the_instruction_at_every_length_and_offset) {
    unsigned char data[100];
    for (int i = 0; i < 100; i++) data[i] = (unsigned char)(i * 197 + 31);
    for (size_t start = 0; start < 9; start++)
        for (size_t n = 0; n + start <= 100; n++)
            CHECK_INT(crc32c(7, data + start, n), crc32c_tables(7, data + start, n));
}

TEST(continues_over_pieces) {
    const char *text = "the quick brown fox jumps over the lazy dog";
    size_t n = strlen(text);
    for (size_t cut = 0; cut <= n; cut++)
        CHECK_INT(crc32c(crc32c(0, text, cut), text + cut, n - cut), crc32c(0, text, n));
}

TEST(sealed_text_does_not_depend_on_its_digits) {
    char text[] = "{\"crc32c\":\"00000000\",\"step\":1}";
    uint32_t crc = crc32c(0, text, strlen(text));
    memcpy(text + 11, "12345678", 8);
    CHECK_INT(crc32c_sealed(text, strlen(text), 11), crc);
    text[20] ^= 1;
    CHECK(crc32c_sealed(text, strlen(text), 11) != crc);
}

int main(void) {
    RUN(known_values);
    RUN(tables_equal_the_instruction_at_every_length_and_offset);
    RUN(continues_over_pieces);
    RUN(sealed_text_does_not_depend_on_its_digits);
    return test_end();
}
