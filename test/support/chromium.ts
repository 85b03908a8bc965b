/** A Chromium for tests that need a browser: one that is installed, or Debian's where this process may install it. */

import { existsSync } from 'node:fs';
import { type Browser, chromium } from 'playwright-core';
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

/** `software`: WebGPU on SwiftShader; `none`: no WebGPU at all. */
export function launchChromium(webgpu: 'software' | 'none'): Promise<Browser> {
  if (executable === undefined) throw new Error('no Chromium');
  return chromium.launch({
    executablePath: executable,
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
