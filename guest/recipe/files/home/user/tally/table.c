#include <stdlib.h>
#include <string.h>

#include "tally.h"

#define SLOTS 4096

static struct entry *slots[SLOTS];
static size_t entries;

static unsigned long hash(const char *word)
{
    unsigned long sum = 5381;

    while (*word)
        sum = sum * 33 + (unsigned char)*word++;
    return sum;
}

int count_word(const char *word)
{
    struct entry **slot = &slots[hash(word) % SLOTS];
    struct entry *entry;

    for (entry = *slot; entry; entry = entry->next) {
        if (strcmp(entry->word, word) == 0) {
            entry->count++;
            return 1;
        }
    }
    entry = calloc(1, sizeof *entry);
    if (!entry)
        return 0;
    strncpy(entry->word, word, WORD_LIMIT - 1);
    entry->count = 1;
    entry->next = *slot;
    *slot = entry;
    entries++;
    return 1;
}

static int more_frequent(const void *a, const void *b)
{
    const struct entry *one = *(struct entry *const *)a;
    const struct entry *other = *(struct entry *const *)b;

    if (one->count != other->count)
        return one->count < other->count ? 1 : -1;
    return strcmp(one->word, other->word);
}

struct entry **by_count(size_t *length)
{
    struct entry **sorted = malloc((entries + 1) * sizeof *sorted);
    size_t filled = 0;

    if (!sorted)
        return NULL;
    for (size_t slot = 0; slot < SLOTS; slot++) {
        for (struct entry *entry = slots[slot]; entry; entry = entry->next)
            sorted[filled++] = entry;
    }
    qsort(sorted, filled, sizeof *sorted, more_frequent);
    *length = filled;
    return sorted;
}
