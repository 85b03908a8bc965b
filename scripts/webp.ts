/** Screenshots as WebP, which is smaller than PNG. */
import { createCanvas, loadImage } from '@napi-rs/canvas';

const QUALITY = 80;

export async function webpOf(png: Uint8Array): Promise<Uint8Array> {
  const image = await loadImage(png);
  const canvas = createCanvas(image.width, image.height);
  canvas.getContext('2d').drawImage(image, 0, 0);
  return canvas.encode('webp', QUALITY);
}
