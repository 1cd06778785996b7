// test_packing.c: every pick of packing.h is the one a plain scan of the buffer makes.
#include "dev/test/test.h"
#include "llmc/packing.h"  // pack_put, pack_take
#include "llmc/rand.h"     // rand_u32

static Packer *packer;
static uint64_t drawn;

static int below(int n) {
    RandKey key = {99, 0, RAND_PARAMETER};
    return (int)((uint64_t)rand_u32(key, drawn++) * (uint64_t)n >> 32);
}

// The buffer as a plain array, in order.
static PackPiece list[PACK_BUFFER];
static int count;

static PackPiece plain_take(int space, bool keep) {
    int best = -1;
    for (int i = 0; i < count; i++)
        if (pack_length(list[i]) <= space &&
            (best < 0 || pack_length(list[i]) > pack_length(list[best])))
            best = i;
    for (int i = 0, none = best < 0; none && i < count; i++)
        if (best < 0 || pack_length(list[i]) < pack_length(list[best])) best = i;
    PackPiece found = list[best];
    memmove(list + best, list + best + 1, sizeof *list * (size_t)(--count - best));
    if (pack_length(found) <= space) return found;
    uint32_t used = (uint32_t)space - found.bos;
    if (keep)
        list[count++] =
            (PackPiece){found.shard, found.start + used, found.tokens - used, 1, found.odd};
    found.tokens = used;
    return found;
}

static void put(PackPiece piece) {
    pack_put(packer, piece);
    list[count++] = piece;
}

// Puts and takes at random, rows of `row`, documents of 1..longest tokens. The picks that differ.
static int differences(int row, int longest, bool keep, int picks) {
    int wrong = 0;
    pack_init(packer, row);
    count = 0;
    for (int i = 0, space = row; i < picks; i++) {
        int target =
            i % 3000 < 2000 ? PACK_BUFFER : below(5);  // full, and now and then nearly empty
        while (count < target)
            put((PackPiece){(uint32_t)i, (uint32_t)below(1000), 1u + (uint32_t)below(longest),
                            (uint16_t)below(2), (uint16_t)below(2)});
        if (!count) continue;
        PackPiece found = pack_take(packer, space, keep), expected = plain_take(space, keep);
        int odd = 0;
        for (int k = 0; k < count; k++) odd += list[k].odd;
        wrong += memcmp(&found, &expected, sizeof found) != 0 || packer->count != count;
        wrong += packer->of[0] != count - odd || packer->of[1] != odd;
        space -= (int)pack_length(found);
        if (!space) space = row;
    }
    pack_free(packer);
    return wrong;
}

TEST(picks_equal_a_plain_scan) {
    int rows[] = {2, 3, 63, 64, 65, 129, 2049}, longest[] = {1, 2, 60, 130, 5000};
    for (int r = 0; r < 7; r++)
        for (int n = 0; n < 5; n++)
            for (int keep = 0; keep < 2; keep++)
                CHECK_INT(differences(rows[r], longest[n], keep, 3500), 0);
}

TEST(longest_that_fits_goes_first) {
    pack_init(packer, 100);
    for (uint32_t n = 10; n <= 50; n += 10) pack_put(packer, (PackPiece){0, n, n, 0, 0});
    CHECK_INT(pack_take(packer, 45, true).tokens, 40);
    CHECK_INT(pack_take(packer, 45, true).tokens, 30);
    CHECK_INT(pack_take(packer, 100, true).tokens, 50);
    CHECK_INT(packer->count, 2);
    pack_free(packer);
}

TEST(equal_documents_go_in_order) {
    pack_init(packer, 100);
    for (uint32_t n = 0; n < 5; n++) pack_put(packer, (PackPiece){n, 0, n % 2 ? 7 : 9, 0, 0});
    CHECK_INT(pack_take(packer, 8, true).shard, 1);
    CHECK_INT(pack_take(packer, 8, true).shard, 3);
    CHECK_INT(pack_take(packer, 8, true).shard, 0);  // nothing fits: the first of the shortest
    pack_free(packer);
}

TEST(tail_of_a_cropped_document_gets_a_bos) {
    pack_init(packer, 100);
    pack_put(packer, (PackPiece){3, 1000, 50, 0, 0});
    PackPiece head = pack_take(packer, 20, true);
    CHECK_INT(head.start, 1000);
    CHECK_INT(head.tokens, 20);
    CHECK_INT(head.bos, 0);
    PackPiece middle = pack_take(packer, 20, true);  // BOS and 19 tokens
    CHECK_INT(middle.start, 1020);
    CHECK_INT(middle.tokens, 19);
    CHECK_INT(middle.bos, 1);
    PackPiece tail = pack_take(packer, 100, true);
    CHECK_INT(tail.start, 1039);
    CHECK_INT(tail.tokens, 11);
    CHECK_INT(packer->count, 0);
    pack_free(packer);
}

TEST(tail_is_dropped_when_asked) {
    pack_init(packer, 100);
    pack_put(packer, (PackPiece){3, 1000, 50, 0, 0});
    CHECK_INT(pack_take(packer, 20, false).tokens, 20);
    CHECK_INT(packer->count, 0);
    pack_free(packer);
}

TEST(tail_goes_after_equal_ones) {
    pack_init(packer, 10);
    pack_put(packer, (PackPiece){1, 0, 20, 0, 0});
    pack_put(packer, (PackPiece){2, 0, 25, 0, 0});
    pack_put(packer, (PackPiece){3, 0, 20, 0, 0});
    CHECK_INT(pack_take(packer, 1, true).shard, 1);  // its tail has 20 tokens again, with the BOS
    CHECK_INT(pack_take(packer, 1, true).shard, 3);
    CHECK_INT(pack_take(packer, 1, true).shard, 1);
    pack_free(packer);
}

TEST(document_of_two_thousand_million_tokens) {
    pack_init(packer, 2049);
    pack_put(packer, (PackPiece){0, 0, 2147483647, 1, 0});
    PackPiece head = pack_take(packer, 2049, true), tail;
    CHECK_INT(head.tokens, 2048);
    tail = pack_take(packer, 2049, true);
    CHECK_INT(tail.start, 2048);
    CHECK_INT(packer->count, 1);
    pack_free(packer);
}

int main(void) {
    packer = die_alloc(1, sizeof *packer, "the packer");
    RUN(picks_equal_a_plain_scan);
    RUN(longest_that_fits_goes_first);
    RUN(equal_documents_go_in_order);
    RUN(tail_of_a_cropped_document_gets_a_bos);
    RUN(tail_is_dropped_when_asked);
    RUN(tail_goes_after_equal_ones);
    RUN(document_of_two_thousand_million_tokens);
    free(packer);
    return test_end();
}
