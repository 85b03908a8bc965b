/** The example of the README in a browser, as pasted. */
import { expect, it } from 'vitest';
import { disposeBackends } from '../../src/index.ts';

it('the ten-line example works as pasted', async () => {
  const result = document.createElement('p');
  result.id = 'result';
  document.body.append(result);
  // A variable keeps the compiler away from JavaScript that imports the package by its name.
  const example = '../../examples/webgpu-browser/main.js';
  await import(/* @vite-ignore */ new URL(example, import.meta.url).href);
  expect(result.textContent).toMatch(/^Attention of \[1,8,512,64\] in \d+ ms$/);
  await disposeBackends();
});
