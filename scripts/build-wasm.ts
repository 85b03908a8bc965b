/** Builds the AssemblyScript kernels, once with SIMD128 and once with relaxed SIMD, into modules that embed them. */
import { mkdir, writeFile } from 'node:fs/promises';
import { fileURLToPath } from 'node:url';
import { gzipSync } from 'node:zlib';
import asc from 'assemblyscript/asc';
import { JOB_FIELDS, SEQUENCE_FIELDS, UNIT_FIELDS } from '../src/backends/wasm/fields.ts';

const ROOT = fileURLToPath(new URL('..', import.meta.url));
const FOLDER = `${ROOT}src/backends/wasm/generated/`;

const OPTIONS = [
  'src/backends/wasm/assembly/index.ts',
  ...['--baseDir', ROOT, '-O3', '--noAssert', '--runtime', 'stub', '--use', 'abort='],
  ...['--importMemory', '--noExportMemory', '--sharedMemory', '--initialMemory', '1', '--maximumMemory', '65536'],
  ...['--enable', 'threads', '--enable', 'simd'],
];

const BUILDS = { simd128: [], relaxed: ['--enable', 'relaxed-simd'] } as const;

/** `export const JOB_Q_HEAD_STRIDE = 76;` for each field of the records, which are 32 bits each. */
function fieldOffsets(): string {
  const constantOf = (name: string) => name.replaceAll(/[A-Z]/g, (letter) => `_${letter}`).toUpperCase();
  const lines = Object.entries({ JOB: JOB_FIELDS, SEQUENCE: SEQUENCE_FIELDS, UNIT: UNIT_FIELDS }).flatMap(
    ([record, names]) =>
      [...names, 'bytes'].map((name, i) => `export const ${record}_${constantOf(name)} = ${4 * i};\n`),
  );
  return `/** Built by scripts/build-wasm.ts from ../fields.ts. */\n${lines.join('')}`;
}

await mkdir(FOLDER, { recursive: true });
await writeFile(`${FOLDER}fields.ts`, fieldOffsets());
for (const [name, extra] of Object.entries(BUILDS)) {
  let binary: Uint8Array | undefined;
  const { error, stderr } = await asc.main([...OPTIONS, ...extra, '-o', 'out.wasm'], {
    writeFile: (_, contents) => {
      if (typeof contents !== 'string') binary = contents;
    },
  });
  if (error !== null || binary === undefined) {
    process.stderr.write(stderr.toString());
    throw error ?? new Error('the AssemblyScript compiler wrote nothing');
  }
  // Half as long again as base64, and a fifth shorter where it counts: gzip finds what repeats where every byte is two letters.
  const hex = Buffer.from(binary).toString('hex');
  await writeFile(
    `${FOLDER}${name}.ts`,
    `/** Built by scripts/build-wasm.ts from ../assembly. */\nexport const HEX =\n  '${hex}';\n`,
  );
  console.log(`${name}: ${binary.length} bytes, ${gzipSync(hex, { level: 9 }).length} gzipped in hexadecimal`);
}
