/**
 * Software GPUs for the tests: Vulkan drivers that run on the CPU, so that WebGPU code is executed on machines without
 * a GPU. `tsx scripts/software-gpu.ts [swiftshader] [lavapipe]` installs what is missing and prints where it is.
 *
 * - SwiftShader comes with Debian's Chromium: no float16 arithmetic, subgroups of 4.
 * - lavapipe is Mesa's: float16 arithmetic, subgroups of 4 or 8. Dawn needs Mesa 23.1 or newer, which older Debians have
 *   in their backports; that one driver is unpacked into `.tools/` and nothing of the system is upgraded.
 */
import { spawnSync } from 'node:child_process';
import { existsSync, mkdirSync, readdirSync, readFileSync, rmSync, writeFileSync } from 'node:fs';
import { dirname, join, resolve } from 'node:path';
import { fileURLToPath } from 'node:url';

export const SOFTWARE_GPUS = ['swiftshader', 'lavapipe'] as const;

export type SoftwareGpu = (typeof SOFTWARE_GPUS)[number];

const ROOT = resolve(dirname(fileURLToPath(import.meta.url)), '..');
const TOOLS = join(ROOT, '.tools', 'lavapipe');
/** Compiled kernels of lavapipe. Its keys do not tell vectors of one width from another's, so each has a folder. */
const KERNELS = join(ROOT, '.tools', 'lavapipe-kernels');
const SWIFTSHADER_ICD = '/usr/lib/chromium/vk_swiftshader_icd.json';
const OLDEST_MESA = 23;

/** Chromium's executable, which brings SwiftShader and runs the browser tests. */
export const CHROMIUM = '/usr/bin/chromium';

/** Flags under which headless Chromium offers WebGPU on SwiftShader, in a container and without network of its own. */
export const CHROMIUM_FLAGS: readonly string[] = [
  '--no-sandbox',
  '--enable-unsafe-webgpu',
  '--use-webgpu-adapter=swiftshader',
  '--disable-background-networking',
  '--disable-component-update',
  '--disable-dev-shm-usage',
];

/** How to get a driver by hand. */
export const REMEDY: Readonly<Record<SoftwareGpu, string>> = {
  swiftshader: 'Debian packages chromium and libvulkan1 (as root: npx tsx scripts/software-gpu.ts swiftshader)',
  lavapipe:
    'Debian packages mesa-vulkan-drivers (23.1 or newer, from backports) and libvulkan1 (as root: npx tsx scripts/software-gpu.ts lavapipe)',
};

const firstFile = (folder: string, pattern: RegExp): string | undefined => {
  if (!existsSync(folder)) return undefined;
  const name = readdirSync(folder).find((entry) => pattern.test(entry));
  return name === undefined ? undefined : join(folder, name);
};

const LAVAPIPE_MANIFEST = /^lvp_icd.*\.json$/;

const output = (command: string, arguments_: readonly string[]): string => {
  const { stdout, status } = spawnSync(command, arguments_, { encoding: 'utf8' });
  return status === 0 ? stdout : '';
};

/** Path of the driver's manifest, for VK_ICD_FILENAMES; `undefined` where it is not installed. */
export function locateSoftwareGpu(gpu: SoftwareGpu): string | undefined {
  if (gpu === 'swiftshader') return existsSync(SWIFTSHADER_ICD) ? SWIFTSHADER_ICD : undefined;
  const own = firstFile(join(TOOLS, 'usr/share/vulkan/icd.d'), LAVAPIPE_MANIFEST);
  if (own !== undefined) return own;
  const installed = Number.parseInt(
    output('dpkg-query', ['-s', 'mesa-vulkan-drivers']).match(/^Version: (\S+)/m)?.[1] ?? '',
    10,
  );
  return installed >= OLDEST_MESA ? firstFile('/usr/share/vulkan/icd.d', LAVAPIPE_MANIFEST) : undefined;
}

/**
 * The environment in which Dawn finds only this driver; set it before Dawn is loaded.
 *
 * @param lanes lanes of lavapipe's vectors, which are its subgroups. A test there is compilation, hardly anything else, and LLVM takes 2.4
 *   times as long for 8 lanes as for 4
 */
export function softwareGpuEnvironment(manifest: string, lanes: 4 | 8 = 4): Record<string, string> {
  const kernels = join(KERNELS, `lanes-${lanes}`);
  // Mesa makes no folder above its own.
  mkdirSync(kernels, { recursive: true });
  return {
    VK_ICD_FILENAMES: manifest,
    VK_DRIVER_FILES: manifest,
    LP_NATIVE_VECTOR_WIDTH: String(32 * lanes),
    MESA_SHADER_CACHE_DIR: kernels,
  };
}

function run(command: string, arguments_: readonly string[], cwd = ROOT): void {
  const { status, stderr, stdout } = spawnSync(command, arguments_, {
    cwd,
    encoding: 'utf8',
    env: { ...process.env, DEBIAN_FRONTEND: 'noninteractive' },
  });
  if (status !== 0) {
    const tail = `${stdout}\n${stderr}`.trim().split('\n').slice(-5).join('\n');
    throw new Error(`${command} ${arguments_.join(' ')} failed:\n${tail}`);
  }
}

export const isRoot = () => process.getuid?.() === 0;

/** Installs Debian packages. */
export function aptInstall(packages: readonly string[]): void {
  run('apt-get', ['update', '-qq']);
  run('apt-get', ['install', '-y', '-qq', '--no-install-recommends', ...packages]);
}

/** The URI and the key from which this machine takes its Debian release, out of its own apt sources. */
function debianSource(codename: string): { uri: string; signedBy: string | undefined } {
  const folder = '/etc/apt/sources.list.d';
  const files = [
    '/etc/apt/sources.list',
    ...(existsSync(folder) ? readdirSync(folder).map((name) => join(folder, name)) : []),
  ];
  for (const file of files.filter((name) => existsSync(name) && /\.(list|sources)$/.test(name))) {
    const text = readFileSync(file, 'utf8');
    if (file.endsWith('.sources')) {
      for (const stanza of text.split(/\n\s*\n/)) {
        const field = (name: string) => stanza.match(new RegExp(`^${name}:\\s*(.+)$`, 'm'))?.[1]?.trim();
        const uri = field('URIs')?.split(/\s+/)[0];
        if (uri !== undefined && field('Suites')?.split(/\s+/).includes(codename) === true) {
          return { uri, signedBy: field('Signed-By') };
        }
      }
    } else {
      for (const line of text.split('\n')) {
        const [, options, uri, suite] = line.match(/^deb\s+(?:\[(.*?)\]\s+)?(\S+)\s+(\S+)/) ?? [];
        if (uri !== undefined && suite === codename) return { uri, signedBy: options?.match(/signed-by=(\S+)/)?.[1] };
      }
    }
  }
  throw new Error(`no apt source for Debian ${codename} was found`);
}

/** Downloads Mesa's driver from backports and unpacks it into `.tools/`. */
function unpackLavapipe(): void {
  rmSync(TOOLS, { recursive: true, force: true });
  const lists = join(TOOLS, 'apt', 'lists');
  const parts = join(TOOLS, 'apt', 'parts');
  mkdirSync(join(lists, 'partial'), { recursive: true });
  mkdirSync(parts, { recursive: true });
  const codename = readFileSync('/etc/os-release', 'utf8').match(/^VERSION_CODENAME=(\S+)/m)?.[1];
  if (codename === undefined) throw new Error('this is no Debian release');
  const { uri, signedBy } = debianSource(codename);
  const signed = signedBy === undefined ? '' : `Signed-By: ${signedBy}\n`;
  writeFileSync(
    join(parts, 'backports.sources'),
    `Types: deb\nURIs: ${uri}\nSuites: ${codename}-backports\nComponents: main\n${signed}`,
  );
  const options = [
    ...['-o', 'Dir::Etc::SourceList=/dev/null', '-o', `Dir::Etc::SourceParts=${parts}`],
    ...['-o', `Dir::State::Lists=${lists}`],
  ];
  run('apt-get', [...options, 'update', '-qq']);
  run('apt-get', [...options, 'download', '-qq', 'mesa-vulkan-drivers'], TOOLS);
  const deb = firstFile(TOOLS, /^mesa-vulkan-drivers_.*\.deb$/);
  if (deb === undefined) throw new Error('apt-get downloaded no mesa-vulkan-drivers');
  run('dpkg', ['-x', deb, TOOLS]);
  rmSync(deb);
  rmSync(join(TOOLS, 'apt'), { recursive: true });
  const manifest = firstFile(join(TOOLS, 'usr/share/vulkan/icd.d'), LAVAPIPE_MANIFEST);
  const library = firstFile(join(TOOLS, 'usr/lib', multiarch()), /^libvulkan_lvp\.so$/);
  if (manifest === undefined || library === undefined) throw new Error('mesa-vulkan-drivers contains no lavapipe');
  const content = JSON.parse(readFileSync(manifest, 'utf8')) as { ICD: { library_path: string } };
  content.ICD.library_path = library;
  writeFileSync(manifest, JSON.stringify(content));
  const missing = output('ldd', [library]).match(/\S+(?= => not found)/g);
  if (missing !== null) {
    rmSync(TOOLS, { recursive: true });
    throw new Error(`lavapipe needs libraries that are not installed: ${missing.join(', ')}`);
  }
}

const multiarch = () => (process.arch === 'arm64' ? 'aarch64-linux-gnu' : 'x86_64-linux-gnu');

/** What the unpacked lavapipe links to, in the versions of Debian 12. */
const LAVAPIPE_LIBRARIES =
  'libllvm15 libdrm2 libelf1 libexpat1 libwayland-client0 libx11-xcb1 libxcb-dri3-0 libxcb-present0 libxcb-randr0 libxcb-shm0 libxcb-sync1 libxcb-xfixes0 libxcb1 libxshmfence1 libzstd1 zlib1g'.split(
    ' ',
  );

/**
 * The driver's manifest; installs the driver where it is missing and this process may.
 *
 * @throws when it cannot be installed, naming what to install
 */
export function ensureSoftwareGpu(gpu: SoftwareGpu): string {
  const there = locateSoftwareGpu(gpu);
  if (there !== undefined) return there;
  if (process.platform !== 'linux' || !isRoot())
    throw new Error(`the software GPU '${gpu}' is not installed; install ${REMEDY[gpu]}`);
  try {
    if (gpu === 'swiftshader') aptInstall(['chromium', 'libvulkan1']);
    else {
      run('apt-get', ['update', '-qq']);
      const policy = output('apt-cache', ['policy', 'mesa-vulkan-drivers']);
      if (Number.parseInt(policy.match(/Candidate: (\S+)/)?.[1] ?? '', 10) >= OLDEST_MESA) {
        aptInstall(['libvulkan1', 'mesa-vulkan-drivers']);
      } else {
        aptInstall(['libvulkan1', ...LAVAPIPE_LIBRARIES]);
        unpackLavapipe();
      }
    }
  } catch (cause) {
    throw new Error(
      `the software GPU '${gpu}' could not be installed (${cause instanceof Error ? cause.message : cause}); install ${REMEDY[gpu]}`,
      { cause },
    );
  }
  const manifest = locateSoftwareGpu(gpu);
  if (manifest === undefined)
    throw new Error(`the software GPU '${gpu}' was installed but is not where it is expected; install ${REMEDY[gpu]}`);
  return manifest;
}

if (process.argv[1] !== undefined && resolve(process.argv[1]) === fileURLToPath(import.meta.url)) {
  const asked = process.argv.slice(2);
  for (const gpu of SOFTWARE_GPUS.filter((name) => asked.length === 0 || asked.includes(name))) {
    console.log(`${gpu}: ${ensureSoftwareGpu(gpu)}`);
  }
}
