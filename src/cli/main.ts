#!/usr/bin/env node
/** The command line of the package. Each command is loaded when it is asked for. */
import { createRequire } from 'node:module';
import { Command } from 'commander';
import { backendOption, integer, kernelOption } from './arguments.ts';
import { UserError } from './errors.ts';
import { disposeBackends, SageAttentionError } from './library.ts';

const { version, description } = createRequire(import.meta.url)('../../package.json') as {
  version: string;
  description: string;
};

const program = new Command('sageattention')
  .description(description)
  .version(version)
  .showHelpAfterError('(--help lists what there is)');

program
  .command('demo')
  .description('a trained sentence encoder on real text, with exact attention and with SageAttention')
  .option('-t, --text <file>', 'a UTF-8 text of your own; default: a chapter of a book that comes with the package')
  .addOption(backendOption('where SageAttention runs'))
  .addOption(kernelOption('which kernel it runs'))
  .option('--max-tokens <n>', 'tokens of the text to take as one sequence, beyond training', integer(1), 16384)
  .option('--json <file>', 'write every figure to a file')
  .action(async (options) => (await import('./demo.ts')).demo(options));

/** A user's mistake is one line; anything else is a defect and shows where. */
function report(error: unknown): void {
  const expected = error instanceof UserError || error instanceof SageAttentionError;
  const text = expected ? `error: ${error.message}` : error instanceof Error ? error.stack : String(error);
  process.stderr.write(`${text}\n`);
  process.exitCode = 1;
}

try {
  await program.parseAsync();
} catch (error) {
  report(error);
} finally {
  await disposeBackends();
}
