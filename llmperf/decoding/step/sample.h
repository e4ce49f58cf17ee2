// The next token of each row, as llmperf/decoding/sampling.py draws it: of the `top_k` likeliest
// those that `top_p` keeps, and of them the one at a uniform number. The greedy choice is top_k 1.
typedef struct { float logit; int32_t id; } Candidate;

// The `top_k` largest of `count` logits, falling; returns how many there are.
static int largest(Candidate *best, const float *logits, int count, const Sampling *s) {
  int found = 0;
  for (int at = 0; at < count; at += 64) {
    const int width = (int)least(64, count - at);
    if (found == s->top_k && width == 64) {  // most blocks hold none of them
      const float least_kept = best[found - 1].logit;
      int any = 0;
      for (int i = 0; i < 64; i++) any |= logits[at + i] > least_kept;
      if (!any) continue;
    }
    for (int id = at; id < at + width; id++) {
      int place = found, keep = found < s->top_k || logits[id] > best[found - 1].logit;
      for (int i = 0; i < s->suppressed_count; i++) keep &= s->suppressed[i] != id;
      if (!keep) continue;
      if (found < s->top_k) found++;
      else place--;
      for (; place > 0 && logits[id] > best[place - 1].logit; place--)
        best[place] = best[place - 1];
      best[place] = (Candidate){logits[id], id};
    }
  }
  return found;
}

EXPORT void next_tokens(const float *logits, int32_t rows, int32_t vocabulary, const Sampling *s,
                        const double *uniforms, int32_t *tokens) {
  Candidate best[MOST_CANDIDATES];
  double weight[MOST_CANDIDATES];
  for (int row = 0; row < rows; row++) {
    const int found = largest(best, logits + (int64_t)row * vocabulary, vocabulary, s);
    double total = 0, before = 0;
    int kept = 0, chosen = 0;
    for (int i = 0; i < found; i++)
      total += weight[i] = exp((best[i].logit - (double)best[0].logit) / s->temperature);
    for (; kept < found && (!kept || before < s->top_p * total); kept++) before += weight[kept];
    const double target = uniforms[row] * before;
    for (before = weight[0]; chosen < kept - 1 && before <= target; before += weight[chosen])
      chosen++;
    tokens[row] = found ? best[chosen].id : 0;
  }
}
