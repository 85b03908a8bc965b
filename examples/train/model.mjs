/** A small character model in TensorFlow.js, its training with any attention, and a picture of losses. */
import tf from '@tensorflow/tfjs';

const [LENGTH, BATCH, DIM, HEADS, LAYERS] = [64, 8, 48, 3, 2];

/** A generator of its own, so that both runs see the same text in the same order. */
function createRandom(seed) {
  let state = seed;
  return () => {
    state = (Math.imul(state, 1664525) + 1013904223) >>> 0;
    return state / 2 ** 32;
  };
}

/** Causal attention in operations of TensorFlow.js. */
export const exactAttention = (q, k, v) => {
  const hidden = tf.sub(1, tf.linalg.bandPart(tf.ones([LENGTH, LENGTH]), -1, 0)).mul(-1e9);
  const scores = tf
    .matMul(q, k, false, true)
    .div(Math.sqrt(DIM / HEADS))
    .add(hidden);
  return tf.matMul(tf.softmax(scores), v);
};

/** Root mean square normalization over channels: also of queries and keys, which keeps scores small (QK-norm). */
const normalized = (x) => x.div(x.square().mean(-1, true).add(1e-5).sqrt());

function createModel(symbols, seed) {
  const random = createRandom(seed);
  const weights = (...shape) => {
    const scale = shape[0] ** -0.5;
    const values = Float32Array.from({ length: shape.reduce((a, b) => a * b) }, () => (random() * 2 - 1) * 1.7 * scale);
    return tf.variable(tf.tensor(values, shape));
  };
  const embedding = weights(symbols, DIM);
  const positions = weights(LENGTH, DIM);
  const blocks = Array.from({ length: LAYERS }, () => ({
    qkv: weights(DIM, 3 * DIM),
    out: weights(DIM, DIM),
    up: weights(DIM, 4 * DIM),
    down: weights(4 * DIM, DIM),
  }));
  const head = weights(DIM, symbols);
  const block = (x, { qkv, out, up, down }, attend) => {
    const parts = tf.split(tf.matMul(normalized(x), qkv).reshape([BATCH, LENGTH, 3 * HEADS, DIM / HEADS]), 3, 2);
    const [q, k, v] = parts.map((part) => part.transpose([0, 2, 1, 3]));
    const attended = attend(normalized(q), normalized(k), v).transpose([0, 2, 1, 3]);
    const y = x.add(tf.matMul(attended.reshape([BATCH * LENGTH, DIM]), out));
    return y.add(tf.matMul(tf.relu(tf.matMul(normalized(y), up)), down));
  };
  return (ids, attend) => {
    const tokens = tf.matMul(tf.oneHot(ids, symbols).toFloat(), embedding);
    const x = tokens.add(tf.tile(positions, [BATCH, 1]));
    return tf.matMul(normalized(blocks.reduce((y, weightsOf) => block(y, weightsOf, attend), x)), head);
  };
}

/** Losses of each step. */
export function train(text, steps, attend) {
  const alphabet = [...new Set(text)].sort();
  const ids = Int32Array.from(text, (character) => alphabet.indexOf(character));
  const model = createModel(alphabet.length, 1);
  const optimizer = tf.train.adam(3e-3);
  const random = createRandom(2);
  const losses = [];
  for (let step = 0; step < steps; step++) {
    const starts = Array.from({ length: BATCH }, () => Math.floor(random() * (ids.length - LENGTH - 1)));
    const slices = (shift) =>
      Int32Array.from(starts.flatMap((start) => [...ids.subarray(start + shift, start + shift + LENGTH)]));
    losses.push(
      tf.tidy(() => {
        const loss = optimizer.minimize(() => {
          const labels = tf.oneHot(tf.tensor1d(slices(1), 'int32'), alphabet.length);
          return tf.losses.softmaxCrossEntropy(labels, model(tf.tensor1d(slices(0), 'int32'), attend)).asScalar();
        }, true);
        return loss.dataSync()[0];
      }),
    );
  }
  return losses;
}

/** Two curves as an SVG. */
export function picture(curves) {
  const [width, height, margin] = [640, 320, 40];
  const all = Object.values(curves).flat();
  const [low, high] = [Math.min(...all), Math.max(...all)];
  const lines = Object.entries(curves).map(([name, losses], i) => {
    const points = losses.map((loss, step) => {
      const x = margin + (step / Math.max(1, losses.length - 1)) * (width - 2 * margin);
      const y = margin + ((high - loss) / (high - low)) * (height - 2 * margin);
      return `${x.toFixed(1)},${y.toFixed(1)}`;
    });
    const style = i === 0 ? 'stroke="#888" stroke-width="5"' : 'stroke="#0a7" stroke-width="1.5"';
    const label = `<text x="${width - 220}" y="${margin + 20 * i}" fill="${i === 0 ? '#888' : '#0a7'}">${name}</text>`;
    return `<polyline fill="none" ${style} points="${points.join(' ')}"/>${label}`;
  });
  const axis = `<text x="${margin}" y="${height - 12}" fill="#888">loss ${high.toFixed(2)} to ${low.toFixed(2)} over ${all.length / 2} steps</text>`;
  return `<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 ${width} ${height}" font-family="sans-serif" font-size="14">${lines.join('')}${axis}</svg>\n`;
}
