/** A Chromium for tests that need a browser: one that is installed, or Debian's where this process may install it. */

import { existsSync } from 'node:fs';
import { type Browser, type BrowserContext, chromium } from 'playwright-core';
import { CHROMIUM, ensureSoftwareGpu } from '../../scripts/software-gpu.ts';
import { messageOf } from '../../src/errors.ts';

const PLACES = [
  process.env.CHROMIUM_PATH ?? '',
  CHROMIUM,
  '/usr/bin/google-chrome',
  '/Applications/Google Chrome.app/Contents/MacOS/Google Chrome',
  'C:\\Program Files\\Google\\Chrome\\Application\\chrome.exe',
];

let executable: string | undefined;

/** What is missing, for `itNeeds`; undefined when there is a browser. */
export function missingChromium(): string | undefined {
  executable = PLACES.find((place) => place !== '' && existsSync(place));
  if (executable !== undefined) return undefined;
  try {
    // Chromium comes with its software GPU.
    ensureSoftwareGpu('swiftshader');
    executable = CHROMIUM;
    return undefined;
  } catch (error) {
    return `a Chromium or Chrome, or its path in CHROMIUM_PATH: ${messageOf(error)}`;
  }
}

const ARGUMENTS = [
  '--headless=new',
  '--no-sandbox',
  '--no-first-run',
  '--disable-background-networking',
  '--disable-component-update',
  '--disable-default-apps',
  '--disable-sync',
];
const NO_WEBGPU = '--disable-features=WebGPU,WebGPUService';

/** `software`: WebGPU on SwiftShader; `none`: no WebGPU at all. */
export function launchChromium(webgpu: 'software' | 'none'): Promise<Browser> {
  if (executable === undefined) throw new Error('no Chromium');
  const software = ['--enable-unsafe-webgpu', '--use-webgpu-adapter=swiftshader'];
  return chromium.launch({
    executablePath: executable,
    args: [...ARGUMENTS, ...(webgpu === 'software' ? software : [NO_WEBGPU])],
  });
}

/** A Chromium of its own with an unpacked extension. */
export function launchWithExtension(folder: string): Promise<BrowserContext> {
  if (executable === undefined) throw new Error('no Chromium');
  return chromium.launchPersistentContext('', {
    executablePath: executable,
    args: [...ARGUMENTS, NO_WEBGPU, `--disable-extensions-except=${folder}`, `--load-extension=${folder}`],
  });
}
