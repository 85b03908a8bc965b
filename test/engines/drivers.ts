/** Firefox by WebDriver BiDi (puppeteer-core), WebKitGTK by WebDriver (selenium-webdriver), and what tests do with either. */
import { type ChildProcess, spawn } from 'node:child_process';
import { createRequire } from 'node:module';
import type { AddressInfo } from 'node:net';
import { createServer } from 'node:net';
import { type Engine, ensureEngine, VIRTUAL_DISPLAY, WEBKIT_DRIVER } from '../../scripts/engines.ts';
import { locateSoftwareGpu, softwareGpuEnvironment } from '../../scripts/software-gpu.ts';

/** An engine's one tab. */
export interface Tab {
  open(url: string): Promise<void>;
  /** The value of an expression; a promise is waited for. */
  evaluate<T>(expression: string): Promise<T>;
  close(): Promise<void>;
}

/** The parts of the drivers' packages that are used here; selenium-webdriver has no types of its own. */
interface Puppeteer {
  launch(options: object): Promise<{
    newPage(): Promise<{ goto(url: string): Promise<unknown>; evaluate(expression: string): Promise<unknown> }>;
    close(): Promise<void>;
  }>;
}
interface Selenium {
  readonly Capabilities: new (capabilities: object) => object;
  readonly Builder: new () => {
    usingServer(url: string): InstanceType<Selenium['Builder']>;
    withCapabilities(capabilities: object): InstanceType<Selenium['Builder']>;
    build(): Promise<{
      get(url: string): Promise<void>;
      executeAsyncScript(script: string): Promise<unknown>;
      manage(): { setTimeouts(timeouts: { readonly script: number }): Promise<void> };
      quit(): Promise<void>;
    }>;
  };
}

const require = createRequire(import.meta.url);
/** Milliseconds that an expression may take. */
const PATIENCE = 120_000;

async function openFirefox(webgpu: boolean): Promise<Tab> {
  const puppeteer = require('puppeteer-core') as Puppeteer;
  const driver = webgpu ? locateSoftwareGpu('lavapipe') : undefined;
  const browser = await puppeteer.launch({
    browser: 'firefox',
    executablePath: ensureEngine('firefox'),
    headless: true,
    protocolTimeout: PATIENCE,
    timeout: PATIENCE,
    env: { ...process.env, ...(driver === undefined ? {} : softwareGpuEnvironment(driver)) },
    extraPrefsFirefox: {
      'dom.webgpu.enabled': webgpu,
      'gfx.webgpu.ignore-blocklist': webgpu,
      // The driver's files lie in a folder that the sandbox does not know.
      ...(webgpu ? { 'security.sandbox.gpu.level': 0, 'security.sandbox.content.level': 0 } : {}),
    },
  });
  const page = await browser.newPage();
  return {
    open: async (url) => {
      await page.goto(url);
    },
    evaluate: async <T>(expression: string) => (await page.evaluate(expression)) as T,
    close: () => browser.close(),
  };
}

async function freePort(): Promise<number> {
  const server = createServer();
  await new Promise<void>((resolve) => server.listen(0, '127.0.0.1', resolve));
  const { port } = server.address() as AddressInfo;
  await new Promise((resolve) => server.close(resolve));
  return port;
}

/** Starts a display of its own. @returns its name */
async function startDisplay(processes: ChildProcess[]): Promise<string> {
  const arguments_ = ['-displayfd', '3', '-screen', '0', '1280x1024x24', '-nolisten', 'tcp'];
  const child = spawn(VIRTUAL_DISPLAY, arguments_, { stdio: ['ignore', 'ignore', 'ignore', 'pipe'] });
  processes.push(child);
  return new Promise((resolve, reject) => {
    child.once('exit', (code) => reject(new Error(`${VIRTUAL_DISPLAY} ended with ${code}`)));
    child.stdio[3]?.once('data', (data: Buffer) => resolve(`:${String(data).trim()}`));
  });
}

async function openWebkit(): Promise<Tab> {
  const { Builder, Capabilities } = require('selenium-webdriver') as Selenium;
  const binary = ensureEngine('webkit');
  const processes: ChildProcess[] = [];
  const stop = () => {
    for (const child of processes) child.kill();
  };
  try {
    const display = await startDisplay(processes);
    const port = await freePort();
    processes.push(
      spawn(WEBKIT_DRIVER, [`--port=${port}`], {
        stdio: 'ignore',
        // Its sandbox needs rights that a container has not.
        env: { ...process.env, DISPLAY: display, WEBKIT_DISABLE_SANDBOX_THIS_IS_DANGEROUS: '1' },
      }),
    );
    const url = `http://127.0.0.1:${port}`;
    for (const until = Date.now() + PATIENCE; Date.now() < until; ) {
      if (
        await fetch(`${url}/status`).then(
          () => true,
          () => false,
        )
      )
        break;
      await new Promise((resolve) => setTimeout(resolve, 100));
    }
    const capabilities = new Capabilities({
      browserName: 'MiniBrowser',
      'webkitgtk:browserOptions': { binary, args: ['--automation'] },
    });
    const driver = await new Builder().usingServer(url).withCapabilities(capabilities).build();
    await driver.manage().setTimeouts({ script: PATIENCE });
    return {
      open: (address) => driver.get(address),
      evaluate: async <T>(expression: string) => {
        const script = `const done = arguments[arguments.length - 1];
          (async () => ${expression})().then((value) => done({ value }), (error) => done({ error: String(error) }));`;
        const { value, error } = (await driver.executeAsyncScript(script)) as { value: T; error?: string };
        if (error !== undefined) throw new Error(error);
        return value;
      },
      close: async () => {
        await driver.quit().catch(() => undefined);
        stop();
      },
    };
  } catch (error) {
    stop();
    throw error;
  }
}

/** @param webgpu with WebGPU on a software driver, which Firefox has and WebKitGTK has not */
export const openEngine = (engine: Engine, webgpu = false): Promise<Tab> =>
  engine === 'firefox' ? openFirefox(webgpu) : openWebkit();
