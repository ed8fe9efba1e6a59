// For tests: an answer that depends on what its working memory held before is wrong by chance alone.

#include "memory.h"

// Whether working memory is handed out full of NaN from now on.
extern "C" void astroattn_spoil(int wanted) { spoils = wanted != 0; }
