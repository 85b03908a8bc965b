import { InvalidArgumentError } from '../../errors.ts';
import { installSageAttention } from '../onnxruntime/index.ts';
import type { SageAttentionOptions } from '../onnxruntime/options.ts';
import { type OrtModule, versionsOf } from '../onnxruntime/ort.ts';

/** `env` of transformers.js: its `backends.onnx` holds the parts of `ort.env` of the onnxruntime that it runs on. */
export interface TransformersEnv {
  readonly backends: { readonly onnx?: unknown };
}

const partsOf = (env: unknown) => (env ?? {}) as { readonly wasm?: object };

/** Why models of transformers.js do not come to `ort`; undefined where they do. */
export function strangerTo(ort: OrtModule, env: TransformersEnv): string | undefined {
  const used = partsOf(env.backends.onnx);
  if (used.wasm !== undefined && used.wasm === partsOf(ort.env).wasm) return undefined;
  const provided = (globalThis as { [name: symbol]: { readonly env?: unknown } | undefined })[
    Symbol.for('onnxruntime')
  ];
  if (provided !== undefined && partsOf(provided.env).wasm === used.wasm) {
    return "transformers.js runs on what the program has put at globalThis[Symbol.for('onnxruntime')]; give that to withSageAttention";
  }
  const version = (of: OrtModule) => Object.values(versionsOf(of)).at(-1) ?? 'of unknown version';
  return (
    `transformers.js runs on another copy of onnxruntime (${version({ ...ort, env: used })}) than the one installed beside ` +
    `sageattention (${version(ort)}), and its attention stays as it is. Have one copy: see "transformers.js" in docs/integrations.md`
  );
}

/** Installs once with the default options, and gives the function that installs with others. */
export function installUnder(ort: OrtModule, env: TransformersEnv): (options?: SageAttentionOptions) => () => void {
  let uninstall: (() => void) | undefined;
  const warn = () => {
    const reason = strangerTo(ort, env);
    if (reason !== undefined) console.warn(`sageattention: ${reason}`);
  };
  try {
    uninstall = installSageAttention(ort);
    warn();
  } catch (error) {
    // The program has done it, with its own options.
    if (!(error instanceof InvalidArgumentError)) throw error;
  }
  return (options) => {
    uninstall?.();
    uninstall = installSageAttention(ort, options);
    warn();
    return uninstall;
  };
}
