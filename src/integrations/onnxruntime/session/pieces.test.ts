import * as ort from 'onnxruntime-node';
import { expect, it } from 'vitest';
import { GraphBuilder } from '../../../../test/support/graph-builder.ts';
import { buildDiT } from '../../../../test/support/models.ts';
import { Random } from '../../../../test/support/random.ts';
import { withSageAttention } from '../index.ts';
import { type GraphProto, readModel } from '../onnx/codec.ts';

const SIZE = { heads: 2, headDim: 8, blocks: 2 };

it('a piece knows the shapes of its inputs as the model in one piece does, behind an attention too', async () => {
  const g = new GraphBuilder(new Random(1));
  buildDiT(g, SIZE, 'fused');
  const opened: GraphProto[] = [];
  const InferenceSession = new Proxy(ort.InferenceSession, {
    get: (target, name, receiver) =>
      name === 'create'
        ? (bytes: Uint8Array, options: object) => {
            opened.push(readModel(bytes).graph as GraphProto);
            return target.create(bytes, options);
          }
        : Reflect.get(target, name, receiver),
  });
  const session = await withSageAttention({ ...ort, InferenceSession }, { minTokens: 0 }).InferenceSession.create(
    g.build(),
  );
  await session.release();
  // Pieces are named `<graph>/<level>`.
  const pieces = opened.filter(({ name }) => /\/\d+$/.test(name));
  expect(pieces.length).toBe(SIZE.blocks + 1);
  const shapes = pieces.slice(1).flatMap(({ input }) =>
    input.map(({ type }) => {
      const tensor = type?.value.case === 'tensorType' ? type.value.value : undefined;
      return tensor?.shape?.dim.map(({ value }) => value.value);
    }),
  );
  expect(shapes).not.toContain(undefined);
  expect(shapes).toContainEqual(['batch', 'tokens', BigInt(SIZE.heads * SIZE.headDim)]);
});
