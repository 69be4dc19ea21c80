#include <stdlib.h>

#include "tally.h"

#define SHOWN 15

int main(int argc, char **argv)
{
    char word[WORD_LIMIT];
    size_t length = 0;
    struct entry **sorted;

    for (int i = 1; i < argc; i++) {
        FILE *file = fopen(argv[i], "r");

        if (!file) {
            perror(argv[i]);
            return 1;
        }
        while (next_word(file, word)) {
            if (!count_word(word)) {
                fputs("tally: out of memory\n", stderr);
                return 1;
            }
        }
        fclose(file);
    }
    sorted = by_count(&length);
    if (!sorted)
        return 1;
    for (size_t i = 0; i < length && i < SHOWN; i++)
        printf("%7lu  %s\n", sorted[i]->count, sorted[i]->word);
    printf("%7zu  different words\n", length);
    return 0;
}
