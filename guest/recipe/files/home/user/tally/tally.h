/* Counts the words of texts: what the user of the demo desktop compiles. */

#include <stddef.h>
#include <stdio.h>

#define WORD_LIMIT 64

struct entry {
    char word[WORD_LIMIT];
    unsigned long count;
    struct entry *next;
};

/* words.c: the next word of a file, 0 at its end. */
int next_word(FILE *file, char word[WORD_LIMIT]);

/* table.c: counts a word; then all entries, the most frequent first. */
int count_word(const char *word);
struct entry **by_count(size_t *length);
