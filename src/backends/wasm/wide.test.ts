import { afterAll, describe, expect, it } from 'vitest';
import { GOLDEN_NAMES, readGolden } from '../../../test/golden/golden.ts';
import { sageattn } from '../../index.ts';
import { setBackend } from '../registry.ts';
import { createWasmBackendOn } from './backend.ts';
import { widen } from './wide.ts';

// Node itself, from the version on in which V8 was tried.
const supported = Number.parseInt(process.versions.v8, 10) >= 13;
const narrow = createWasmBackendOn({ threads: 2 });
const wide = createWasmBackendOn({ threads: 2, wide: true });
afterAll(() => Promise.all([narrow.dispose(), wide.dispose()]));

describe('vectors of 256 bits', () => {
  it('are named, or why there are none', async () => {
    expect((await narrow.availability()).details).not.toHaveProperty('vectors');
    const { vectors } = (await wide.availability()).details;
    expect(vectors).toMatch(supported ? /^256 bits/ : /^128 bits: only Node 24/);
  });

  it.each(GOLDEN_NAMES)('give the bits of 128 on golden %s', async (name) => {
    const { q, k, v, isCausal } = readGolden(name);
    for (const kernel of ['qk-int8-pv-int8', 'qk-int8-pv-fp16'] as const) {
      const outputs: Uint8Array[] = [];
      // The wide one twice: V8 compiles a function better after some calls.
      for (const backend of [narrow, wide, wide]) {
        await setBackend(backend);
        const { data } = await sageattn(q, k, v, { backend: 'wasm', kernel, isCausal });
        outputs.push(new Uint8Array(data.buffer as ArrayBuffer, data.byteOffset, data.byteLength));
      }
      for (const other of outputs.slice(1)) expect(Buffer.compare(outputs[0] as Uint8Array, other)).toBe(0);
    }
  });

  it('are refused where kernels compiled so compute something else', async () => {
    if (!supported) return;
    const { HEX } = await import('./generated/simd128.ts');
    // What a wrong compiler does: other code the second time.
    let asked = 0;
    const [multiply, add] = [Buffer.from([0xfd, 0xe6, 0x01]), 0xe4];
    const other = Buffer.from(HEX, 'hex');
    for (let at = other.indexOf(multiply); at >= 0; at = other.indexOf(multiply, at + 1)) other[at + 1] = add;
    const simd128 = async () => ({ HEX: asked++ === 0 ? HEX : other.toString('hex') });
    expect(await widen('simd128', { simd128, relaxed: simd128 })).toMatch(/computes wrongly/);
  });
});
