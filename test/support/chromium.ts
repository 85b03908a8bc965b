/** A Chromium for tests that need a browser: one that is installed, or Debian's where this process may install it. */
import { spawnSync } from 'node:child_process';
import { existsSync } from 'node:fs';
import { type Browser, chromium } from 'playwright-core';

const PLACES = [
  process.env.CHROMIUM_PATH ?? '',
  '/usr/bin/chromium',
  '/usr/bin/chromium-browser',
  '/usr/bin/google-chrome',
  '/Applications/Google Chrome.app/Contents/MacOS/Google Chrome',
  'C:\\Program Files\\Google\\Chrome\\Application\\chrome.exe',
];

const find = () => PLACES.find((place) => place !== '' && existsSync(place));

function install(): void {
  if (process.getuid?.() !== 0 || !existsSync('/usr/bin/apt-get')) return;
  const apt = (...args: string[]) =>
    spawnSync('apt-get', args, { stdio: 'ignore', env: { ...process.env, DEBIAN_FRONTEND: 'noninteractive' } });
  apt('update');
  apt('install', '-y', '--no-install-recommends', 'chromium');
}

let path: string | undefined;

/** What is missing, for `itNeeds`; undefined when there is a browser. */
export function missingChromium(): string | undefined {
  path ??= find();
  if (path === undefined) {
    install();
    path = find();
  }
  return path === undefined
    ? 'a Chromium or Chrome (apt-get install chromium), or its path in CHROMIUM_PATH'
    : undefined;
}

/** `software`: WebGPU on SwiftShader; `none`: no WebGPU at all. */
export function launchChromium(webgpu: 'software' | 'none'): Promise<Browser> {
  if (path === undefined) throw new Error('no Chromium');
  return chromium.launch({
    executablePath: path,
    args: [
      '--headless=new',
      '--no-sandbox',
      '--no-first-run',
      '--disable-background-networking',
      '--disable-component-update',
      '--disable-default-apps',
      '--disable-sync',
      ...(webgpu === 'software'
        ? ['--enable-unsafe-webgpu', '--use-webgpu-adapter=swiftshader']
        : ['--disable-features=WebGPU,WebGPUService']),
    ],
  });
}
