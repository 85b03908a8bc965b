/**
 * Trains a small character model on the book chapter of this repository, twice from the same start: with exact attention in
 * operations of TensorFlow.js, and with SageAttention. Prints both losses, and draws them to a file if one is named.
 *
 * node main.mjs [steps] [picture.svg]
 */
import { readFileSync, writeFileSync } from 'node:fs';
import tf from '@tensorflow/tfjs';
import { createTrainableAttention } from 'sageattention/tfjs';
import { exactAttention, picture, train } from './model.mjs';

const [steps = '60', file] = process.argv.slice(2);
await tf.setBackend('cpu');
const text = readFileSync(new URL('../../src/cli/alice-chapter-1.txt', import.meta.url), 'utf8');
const attention = await createTrainableAttention();
const exact = train(text, Number(steps), exactAttention);
const ours = train(text, Number(steps), (q, k, v) => attention(q, k, v, { isCausal: true }));
exact.forEach((loss, step) => {
  if (step % 10 === 9)
    console.log(`step ${step + 1}: exact ${loss.toFixed(4)}, SageAttention ${ours[step].toFixed(4)}`);
});
const apart = Math.max(...exact.map((loss, step) => Math.abs(ours[step] / loss - 1)));
console.log(`largest difference of a step's losses: ${(100 * apart).toFixed(2)}%`);
if (file !== undefined) writeFileSync(file, picture({ 'exact attention': exact, SageAttention: ours }));
