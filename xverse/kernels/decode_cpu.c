/* X -> X. All layers of a decode step in one call: a small model's step is shorter than what Python
   needs to ask for its operations one by one. Called by decode_cpu.py. */

#include <stdlib.h>

#include "native_cpu.h"

/* One token each of `rows` sequences through all layers, x [rows, hidden] in place; `pages` is for
   every layer but for keys and values. Returns 1 where memory ran out. */
int decode(const Layer *layers, int count, const Pages *pages, void *x, const void *cosines,
           const void *sines, int64_t rows, int bf16, int threads)
{
    const int64_t bytes = bf16 ? 2 : 4, size = pages->size;
    const int64_t stride = layers->qkv.outputs, mixed = layers->o.inputs;
    const int64_t room = rows * (stride + mixed + layers->gate_up.outputs) * bytes;
    char *const memory = malloc((size_t)room);
    if (!memory) return 1;
    char *const q = memory, *const k = q + pages->heads * size * bytes;
    char *const v = k + pages->kv_heads * size * bytes;
    char *const out = memory + rows * stride * bytes, *const inner = out + rows * mixed * bytes;
    const int turned = pages->heads + pages->kv_heads;
    int failed = 0;
    for (const Layer *layer = layers; layer < layers + count && !failed; layer++) {
        Pages own = *pages;
        own.keys = layer->keys;
        own.values = layer->values;
        failed = multiply(&layer->qkv, x, NULL, q, rows, bf16, threads);
        rotate(q, cosines, sines, rows, stride, turned, size, bf16, threads);
        failed |= attend(&own, q, k, v, out, rows, stride, stride, stride, bf16, threads);
        failed |= multiply(&layer->o, out, x, x, rows, bf16, threads);
        failed |= multiply(&layer->gate_up, x, NULL, inner, rows, bf16, threads);
        failed |= multiply(&layer->down, inner, x, x, rows, bf16, threads);
    }
    free(memory);
    return failed;
}
