#include <ctype.h>

#include "tally.h"

int next_word(FILE *file, char word[WORD_LIMIT])
{
    size_t length = 0;
    int c;

    while ((c = getc(file)) != EOF) {
        if (!isalpha(c)) {
            if (length > 0)
                break;
            continue;
        }
        if (length < WORD_LIMIT - 1)
            word[length++] = c;
    }
    word[length] = '\0';
    return length > 0;
}
