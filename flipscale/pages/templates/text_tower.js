// The tokenizer: SentencePiece's unigram model, as the tokenizers library computes it.
const encoder = new TextEncoder(), decoder = new TextDecoder("utf-8", {ignoreBOM: true}), clusters = new Intl.Segmenter();
const vocabulary = new Map(tower.pieces.map(([piece, score], id) => [piece, {id, score}]));
const silent = new Set([tower.unknown.id, ...Object.values(tower.special)]);
const special = new RegExp(`(${Object.keys(tower.special).join("|")})`);
const characters = bytes(tower.characters), view = new DataView(characters.buffer);  // a trie as a double array, then texts
const unit = node => view.getUint32(4 + 4 * node, true), offset = unit => (unit >>> 10) << ((unit & 512) >>> 6);

const replacement = text => {
  let node = offset(unit(0));
  for (const byte of encoder.encode(text)) {
    const next = unit(node ^= byte);
    if (!byte || (next & 0x800000ff) !== byte) return undefined;
    node ^= offset(next);
    if (next & 256) {
      const from = 4 + view.getUint32(0, true) + (unit(node) & 0x7fffffff);
      return decoder.decode(characters.subarray(from, characters.indexOf(0, from)));
    }
  }
};

const normalised = text => [...clusters.segment(text)].map(({segment}) =>
  (encoder.encode(segment).length < 6 ? replacement(segment) : undefined) ??
  [...segment].map(letter => replacement(letter) ?? letter).join("")).join("").trim().replace(/ {2,}/g, " ");

const ofWord = word => {
  const letters = [...word], best = [{score: 0}], ids = [];
  letters.forEach((letter, from) => {
    const offer = (to, {id, score}) => {
      score += best[from].score;
      if (!best[to] || score > best[to].score) best[to] = {score, id, from};
    };
    let piece = "";
    for (let to = from; to < Math.min(letters.length, from + tower.longest); to++) {
      piece += letters[to];
      if (vocabulary.has(piece)) offer(to + 1, vocabulary.get(piece));
    }
    if (!vocabulary.has(letter)) offer(from + 1, tower.unknown);
  });
  for (let at = letters.length; at > 0; at = best[at].from)  // neighbouring unknown letters are one token
    if (best[at].id !== tower.unknown.id || ids[0] !== tower.unknown.id) ids.unshift(best[at].id);
  return ids;
};

const tokens = text => text.split(special).flatMap(part => {
  if (Object.hasOwn(tower.special, part)) return [tower.special[part]];
  const marked = normalised(part).replaceAll(" ", "▁");
  return marked ? `${marked.startsWith("▁") ? "" : "▁"}${marked}`.split(/(?=▁)/).flatMap(ofWord) : [];
}).slice(0, tower.max_position_embeddings);

// Whether a token of a text is more than a blank.
const knows = text => tokens(text).some(id => !silent.has(id) && id !== vocabulary.get("▁")?.id);

// The tower: tokens are rows, as in flipscale/model/modeling_flip.py.
const weights = {};
for (const [name, text] of Object.entries(tower.weights)) weights[name] = new Float32Array(bytes(text).buffer);
const activation = {
  relu: x => Math.max(x, 0),
  gelu_pytorch_tanh: x => x / 2 * (1 + Math.tanh(Math.sqrt(2 / Math.PI) * (x + 0.044715 * x ** 3))),
}[tower.hidden_act];
const plus = (rows, others) => rows.map((row, at) => row.map((value, i) => value + others[at][i]));
const linear = (rows, name) => rows.map(row => {
  const matrix = weights[`${name}.weight`], bias = weights[`${name}.bias`], width = row.length;
  return Float32Array.from({length: matrix.length / width},
    (_, out) => dot(row, matrix.subarray(out * width, (out + 1) * width)) + (bias ? bias[out] : 0));
});
const norm = (rows, name) => rows.map(row => {
  const mean = row.reduce((sum, value) => sum + value, 0) / row.length, centred = row.map(value => value - mean);
  const scale = 1 / Math.sqrt(dot(centred, centred) / row.length + tower.layer_norm_eps);
  return centred.map((value, i) => value * scale * weights[`${name}.weight`][i] + weights[`${name}.bias`][i]);
});
const attention = (queries, keys, values) => queries.map(query => {
  const result = new Float32Array(query.length), size = query.length / tower.num_attention_heads;
  for (let from = 0; from < query.length; from += size) {
    const part = row => row.subarray(from, from + size);
    const scores = keys.map(key => dot(part(query), part(key)) / Math.sqrt(size)), highest = Math.max(...scores);
    const shares = scores.map(score => Math.exp(score - highest)), total = shares.reduce((sum, share) => sum + share);
    values.forEach((row, at) => part(row).forEach((value, i) => result[from + i] += value * shares[at] / total));
  }
  return result;
});

// Returns a text's embedding, of unit length; undefined where the tokenizer knows no part of the text.
const embed = text => {
  const ids = tokens(text), width = tower.hidden_size;
  const row = (kind, at) => weights[`embeddings.${kind}_embedding.weight`].subarray(at * width, (at + 1) * width);
  if (ids.every(id => silent.has(id))) return undefined;
  while (tower.attend_to_padding && ids.length < tower.max_position_embeddings) ids.push(tower.pad_token_id);
  const places = [...ids.keys()].filter(at => tower.attend_to_padding || ids[at] !== tower.pad_token_id);
  let rows = plus(places.map(at => row("token", ids[at])), places.map(at => row("position", at)));
  for (let layer = 0; layer < tower.num_hidden_layers; layer++) {
    const name = `encoder.layers.${layer}`, inputs = norm(rows, `${name}.layer_norm1`);
    const states = ["q_proj", "k_proj", "v_proj"].map(kind => linear(inputs, `${name}.self_attn.${kind}`));
    rows = plus(rows, linear(attention(...states), `${name}.self_attn.out_proj`));
    const hidden = linear(norm(rows, `${name}.layer_norm2`), `${name}.mlp.fc1`).map(row => row.map(activation));
    rows = plus(rows, linear(hidden, `${name}.mlp.fc2`));
  }
  rows = norm(rows, "final_layer_norm");
  const mean = rows[0].map((_, i) => rows.reduce((sum, row) => sum + row[i], 0) / rows.length);
  const [result] = linear([tower.pooling === "first" ? rows[0] : mean], "projection");
  return result.map(value => value / (Math.sqrt(dot(result, result)) + 1e-8));
};
