/** The little that this page needs of a view library. */
import { fromAddress, toAddress } from './url-state.ts';

type Child = Node | string | number | null | undefined | false;
type Attributes = Readonly<Record<string, string | number | boolean | EventListener | undefined>>;

/** A new element. Attributes that start with `on` are listeners; `true` is an empty attribute, `false` none. */
export function h<K extends keyof HTMLElementTagNameMap>(
  tag: K,
  attributes: Attributes = {},
  ...children: readonly (Child | readonly Child[])[]
): HTMLElementTagNameMap[K] {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (value === undefined || value === false) continue;
    if (typeof value === 'function') element.addEventListener(name.slice(2), value);
    else element.setAttribute(name, value === true ? '' : String(value));
  }
  for (const child of children.flat() as Child[]) {
    if (child === null || child === undefined || child === false) continue;
    element.append(child instanceof Node ? child : String(child));
  }
  return element;
}

/** An element of `index.html`. */
export function byId<T extends HTMLElement = HTMLElement>(id: string): T {
  const element = document.getElementById(id);
  if (element === null) throw new Error(`index.html has no element #${id}`);
  return element as T;
}

export const messageOf = (error: unknown) => (error instanceof Error ? error.message : String(error));

/** A line for the user; empty clears it. */
export function say(element: HTMLElement, text: string, bad = false): void {
  element.textContent = text;
  element.classList.toggle('bad', bad);
}

/** Offers a file to be saved. */
export function download(file: Blob, name: string): void {
  const url = URL.createObjectURL(file);
  h('a', { href: url, download: name }).click();
  // Some browsers read it only after they have asked where to put it.
  setTimeout(() => URL.revokeObjectURL(url), 60_000);
}

const exclusive = new Set<HTMLButtonElement>();
let working = false;

/**
 * A button whose work takes the whole device. While the work of one lasts none of them can be pressed: what runs beside a
 * measurement is measured with it.
 *
 * @param stop a button that can be pressed while the work lasts, and what it does
 */
export function exclusively(
  button: HTMLButtonElement,
  work: () => Promise<void>,
  stop?: { readonly button: HTMLButtonElement; readonly press: () => void },
): void {
  const lock = (on: boolean) => {
    working = on;
    for (const each of exclusive) each.disabled = on;
  };
  exclusive.add(button);
  button.disabled = working;
  stop?.button.addEventListener('click', () => {
    stop.button.disabled = true;
    stop.press();
  });
  button.addEventListener('click', async () => {
    lock(true);
    if (stop !== undefined) {
      stop.button.disabled = false;
      stop.button.focus();
    }
    try {
      await work();
    } finally {
      if (stop !== undefined) {
        if (document.activeElement === stop.button) stop.button.blur();
        stop.button.disabled = true;
      }
      lock(false);
      // A button that is disabled loses the focus; one who has gone elsewhere meanwhile is left there.
      if (document.activeElement === document.body) button.focus({ preventScroll: true });
    }
  });
}

/** A line that changes many times a second is read out once it has come to rest. */
export function saySteadily(element: HTMLElement, changing: boolean): void {
  element.setAttribute('aria-busy', String(changing));
}

/** Runs `work` at most once a frame, with what was asked for last; while one run lasts, the next waits for its end. */
export function latest<T>(work: (input: T) => Promise<void>): (input: T) => void {
  let waiting: { input: T } | undefined;
  let busy = false;
  const next = async () => {
    const job = waiting;
    waiting = undefined;
    if (job === undefined) {
      busy = false;
      return;
    }
    try {
      await work(job.input);
    } finally {
      requestAnimationFrame(() => void next());
    }
  };
  return (input) => {
    waiting = { input };
    if (busy) return;
    busy = true;
    requestAnimationFrame(() => void next());
  };
}

interface Option<T extends string> {
  readonly value: T;
  readonly label: string;
}

export interface Control<T> {
  readonly element: HTMLElement;
  readonly value: T;
}

let fields = 0;

/** Whether a value is one of a field's. */
const isOneOf =
  (options: readonly Option<string>[]) =>
  (value: string): boolean =>
    options.some((option) => option.value === value);

/**
 * A drop-down list.
 *
 * @param key its name in the page's address; none: it is not kept there
 */
export function selectField<T extends string>(
  name: string,
  options: readonly Option<T>[],
  initial: T,
  onChange: () => void,
  key?: string,
): Control<T> & { setOptions(options: readonly Option<T>[]): void } {
  const id = `field-${fields++}`;
  const select = h('select', {
    id,
    onchange: () => {
      toAddress(key, select.value, initial);
      onChange();
    },
  });
  const setOptions = (next: readonly Option<T>[]) => {
    const before = select.value;
    select.replaceChildren(...next.map(({ value, label }) => h('option', { value }, label)));
    select.value = next.some(({ value }) => value === before) ? before : (next[0]?.value ?? '');
  };
  setOptions(options);
  select.value = fromAddress(key, initial, isOneOf(options));
  return {
    element: h('div', { class: 'field' }, h('label', { for: id }, name), select),
    get value() {
      return select.value as T;
    },
    setOptions,
  };
}

/** A slider that shows its value. */
export function rangeField(
  name: string,
  { min, max, step, initial, unit = '' }: { min: number; max: number; step: number; initial: number; unit?: string },
  onInput: () => void,
  key?: string,
): Control<number> & { enable(on: boolean): void; set(value: number): void } {
  const id = `field-${fields++}`;
  const isAllowed = (text: string) => {
    const value = Number(text);
    return text.trim() !== '' && value >= min && value <= max && Number.isInteger((value - min) / step);
  };
  const start = fromAddress(key, String(initial), isAllowed);
  const show = () => {
    shown.textContent = `${input.value}${unit}`;
  };
  const shown = h('output', { for: id }, `${start}${unit}`);
  const input = h('input', {
    id,
    type: 'range',
    min,
    max,
    step,
    value: start,
    oninput: () => {
      show();
      toAddress(key, input.value, String(initial));
      onInput();
    },
  });
  return {
    element: h('div', { class: 'field' }, h('label', { for: id }, `${name} `, shown), input),
    get value() {
      return Number(input.value);
    },
    enable(on) {
      input.disabled = !on;
    },
    /** As the page itself moves it: no listener hears of it, and the address keeps what a user chose. */
    set(value) {
      input.value = String(value);
      show();
    },
  };
}

/** A box or button for each option, with its words, under one name. */
function choices(name: string, options: readonly Option<string>[], inputs: readonly HTMLInputElement[]): HTMLElement {
  const labels = options.map(({ label }, i) => h('label', {}, inputs[i], label));
  return h('fieldset', { class: 'field' }, h('legend', {}, name), h('div', { class: 'choices' }, labels));
}

/** One of a few, all of them in sight. */
export function radioField<T extends string>(
  name: string,
  options: readonly Option<T>[],
  initial: T,
  onChange: () => void,
  key?: string,
): Control<T> {
  const group = `field-${fields++}`;
  const start = fromAddress(key, initial, isOneOf(options));
  const onchange = (event: Event) => {
    toAddress(key, (event.target as HTMLInputElement).value, initial);
    onChange();
  };
  const inputs = options.map(({ value }) =>
    h('input', { type: 'radio', name: group, value, checked: value === start, onchange }),
  );
  return {
    element: choices(name, options, inputs),
    get value() {
      return (inputs.find(({ checked }) => checked)?.value ?? initial) as T;
    },
  };
}

/** Any of a few. */
export function checkField<T extends string>(
  name: string,
  options: readonly Option<T>[],
  initial: readonly T[],
  onChange: () => void,
): Control<readonly T[]> {
  const inputs = options.map(({ value }) =>
    h('input', { type: 'checkbox', value, checked: initial.includes(value), onchange: onChange }),
  );
  return {
    element: choices(name, options, inputs),
    get value() {
      return inputs.filter(({ checked }) => checked).map(({ value }) => value as T);
    },
  };
}

/**
 * A button that copies a text, and says that it has.
 *
 * @param copied the text, or what copies something else
 */
export function copyButton(label: string, copied: () => string | Promise<void>): HTMLButtonElement {
  const button = h('button', { type: 'button' }, label);
  button.addEventListener('click', async () => {
    try {
      const text = copied();
      await (typeof text === 'string' ? navigator.clipboard.writeText(text) : text);
      button.textContent = 'Copied';
    } catch {
      button.textContent = 'Your browser does not let a page copy';
    }
    setTimeout(() => {
      button.textContent = label;
    }, 2000);
  });
  return button;
}

/** Code that does what is shown above it, folded. */
export function codeBox(title: string): { readonly element: HTMLElement; set(code: string): void } {
  const code = h('code');
  // What does not fit is scrolled to, which a keyboard can do only to what takes the focus.
  const block = h('pre', { tabindex: 0, role: 'region', 'aria-label': title }, code);
  const copy = copyButton('Copy the code', () => code.textContent ?? '');
  return {
    element: h('details', { class: 'code' }, h('summary', {}, title), block, copy),
    set(text) {
      code.textContent = text;
    },
  };
}
