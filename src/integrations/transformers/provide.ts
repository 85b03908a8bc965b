import { withSageAttention } from '../onnxruntime/index.ts';
import type { OrtModule } from '../onnxruntime/ort.ts';

/** Where transformers.js looks for an onnxruntime, once, when it is loaded. */
const ONNXRUNTIME = Symbol.for('onnxruntime');

type Create = (model: unknown, options?: { readonly executionProviders?: readonly unknown[] }) => Promise<object>;

/**
 * Offers `ort` with replaced attention to transformers.js. An onnxruntime that a program has put there itself stays.
 *
 * @param providers execution providers where the caller names none: `device: 'auto'` comes as an empty list
 */
export function provideOnnxruntime(ort: OrtModule, providers: () => Promise<readonly string[]>): void {
  const scope = globalThis as { [ONNXRUNTIME]?: unknown };
  if (scope[ONNXRUNTIME] !== undefined) return;
  const { InferenceSession } = withSageAttention(ort);
  const create: Create = InferenceSession.create.bind(InferenceSession) as Create;
  const withProviders: Create = async (model, options = {}) => {
    const named = (options.executionProviders?.length ?? 0) > 0;
    return create(model, named ? options : { ...options, executionProviders: await providers() });
  };
  scope[ONNXRUNTIME] = {
    ...ort,
    InferenceSession: new Proxy(InferenceSession, {
      get: (target, name, receiver) => (name === 'create' ? withProviders : Reflect.get(target, name, receiver)),
    }),
  };
}
